"""Build a dataset: read the sources, train a tokenizer, encode, write shards. Killed at any moment, it can go on.

The steps, each of which a later call skips if it is done:

1. Read everything once: count, hash, and fix the border between training and validation.
2. Train the tokenizer on training documents only.
3. Read again, encode in worker processes, write shards; the journal notes each finished shard.
4. Write the manifest and remove the journal.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.encoding import encode_in_order
from data_prep.errors import UserError
from data_prep.files import atomic_file, only_writer_of, write_atomically
from data_prep.journal import Journal, Reading, differences
from data_prep.progress import Reporter, SilentReporter
from data_prep.shards import (
    DEFAULT_SHARD_TOKENS,
    FORMAT_NAME,
    FORMAT_VERSION,
    JOURNAL,
    LARGEST_SHARD_TOKENS,
    MANIFEST,
    SPLITS,
    TOKENIZER_FILE,
    ShardWriter,
    open_dataset,
    split_totals,
    token_dtype,
)
from data_prep.sources import (
    DEFAULT_MAX_DOCUMENT_BYTES,
    SMALLEST_MAX_DOCUMENT_BYTES,
    STDIN,
    Document,
    ReadReport,
    copy_stdin,
    describe_sources,
    read_documents,
)
from data_prep.splitting import CorpusDigest, SplitRule, hash_of
from data_prep.tokenizers import KINDS, Tokenizer, train_tokenizer

BATCH_BYTES = 1 << 18  # text that a worker encodes at a time
STDIN_COPY = "stdin.txt"


@dataclass(frozen=True)
class BuildSettings:
    """All that a build can be told. Only ``workers`` does not change the result."""

    sources: tuple[str, ...]
    out: Path
    vocab_size: int = 8192
    tokenizer_kind: str = "bpe"
    #: A tokenizer.json to use instead of training one of ``tokenizer_kind``.
    tokenizer: Path | None = None
    workers: int = 1
    #: The share of documents that is kept for validation, at least 0 and below 1.
    validation_fraction: float = 0.05
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    text_field: str = "text"
    #: The tokenizer is trained on the first training documents up to this many bytes.
    train_bytes: int = 200_000_000
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    def check(self) -> None:
        """Raise ``UserError`` with a line for each setting that cannot be."""
        problems = []
        if not self.sources:
            problems.append("no source is named: give a file, a folder, - or builtin")
        if list(self.sources).count(STDIN) > 1:
            problems.append("standard input (-) can be read only once")
        if self.tokenizer_kind not in KINDS:
            problems.append(f'unknown tokenizer kind "{self.tokenizer_kind}": choose one of {", ".join(KINDS)}')
        if not 0 <= self.validation_fraction < 1:
            problems.append(f"--validation-fraction {self.validation_fraction} must be at least 0 and below 1")
        if self.max_document_bytes < SMALLEST_MAX_DOCUMENT_BYTES:
            problems.append(f"--max-document-bytes must be at least {SMALLEST_MAX_DOCUMENT_BYTES}")
        if not 1 <= self.shard_tokens <= LARGEST_SHARD_TOKENS:
            problems.append(f"--shard-tokens must be from 1 to {LARGEST_SHARD_TOKENS}")
        if self.workers < 1 or self.train_bytes < 1:
            problems.append("--workers and --train-bytes must be at least 1")
        if problems:
            raise UserError("\n".join(problems))

    def identity(self) -> dict[str, Any]:
        """What decides the result, without the places where files lie. Raises ``UserError`` for a missing file."""
        if self.tokenizer is not None:
            tokenizer: dict[str, Any] = {"tokenizer_sha256": Tokenizer.load(self.tokenizer).sha256}
        elif self.tokenizer_kind == "bytes":
            tokenizer = {"tokenizer_kind": "bytes"}
        else:
            tokenizer = {
                "tokenizer_kind": self.tokenizer_kind,
                "vocab_size": self.vocab_size,
                "train_bytes": self.train_bytes,
            }
        return tokenizer | {
            "sources": describe_sources(self.sources),
            "validation_fraction": self.validation_fraction,
            "max_document_bytes": self.max_document_bytes,
            "text_field": self.text_field,
            "shard_tokens": self.shard_tokens,
        }


def build(settings: BuildSettings, *, progress: Reporter | None = None) -> dict[str, Any]:
    """Build the dataset in ``settings.out``, or go on with an interrupted build there; returns its manifest.

    A dataset that is already there with the same settings is left as it is. Raises ``UserError``; a new build that
    fails so leaves nothing behind.
    """
    progress = progress or SilentReporter()
    settings.check()
    identity = settings.identity()
    out = settings.out
    if out.exists() and not out.is_dir():
        raise UserError(f'"{out}" is a file: choose another --out')
    created = _make_directories(out)
    with only_writer_of(out, f'another build is writing "{out}": wait for it, or choose another --out'):
        if (out / MANIFEST).is_file():
            return _finished(out, identity, progress)
        journal = Journal.load(out)
        if journal is not None:
            _refuse_other_settings(out, journal.identity, identity)
            progress.note(f'going on with the build in "{out}"')
            return _Build(settings, journal, progress).run()
        _refuse_other_files(out)
        try:
            return _Build(settings, Journal(out / JOURNAL, identity), progress).run()
        except UserError:
            for path in out.iterdir():
                path.unlink()
            for directory in created:
                directory.rmdir()
            raise


def _make_directories(directory: Path) -> list[Path]:
    """Create a directory and those above it; returns the new ones, the deepest first."""
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return created


def _finished(out: Path, identity: dict[str, Any], progress: Reporter) -> dict[str, Any]:
    manifest = open_dataset(out).manifest
    _refuse_other_settings(out, {"sources": manifest["sources"]} | manifest["settings"], identity)
    (out / JOURNAL).unlink(missing_ok=True)  # a build killed between its last two steps leaves it
    (out / STDIN_COPY).unlink(missing_ok=True)
    progress.note(f'"{out}" is already built with these settings: nothing to do')
    return manifest


def _refuse_other_settings(out: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    changes = "; ".join(differences(there, asked))
    if changes:
        raise UserError(f'"{out}" holds a build with other settings ({changes}): choose another --out')


def _refuse_other_files(out: Path) -> None:
    # A build killed at its very first write leaves the journal's temporary file.
    others = [path.name for path in out.iterdir() if path.name != f"{JOURNAL}.tmp"]
    if others:
        raise UserError(f'"{out}" is not empty (it holds "{min(others)}") and holds no build: choose another --out')


@dataclass
class _Build:
    settings: BuildSettings
    journal: Journal
    progress: Reporter

    def run(self) -> dict[str, Any]:
        out = self.settings.out
        self.journal.save()
        if STDIN in self.settings.sources:
            with atomic_file(out / STDIN_COPY) as file:
                copy_stdin(file)
        reading = self.journal.reading or self._read_all()
        tokenizer = self._tokenizer(reading)
        self._write_shards(reading, tokenizer)
        manifest = self._manifest(reading, tokenizer)
        write_atomically(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        self.journal.path.unlink()
        (out / STDIN_COPY).unlink(missing_ok=True)
        return manifest

    def _documents(self, report: ReadReport | None = None) -> Iterator[Document]:
        stdin_copy = str(self.settings.out / STDIN_COPY)
        return read_documents(
            [stdin_copy if source == STDIN else source for source in self.settings.sources],
            max_document_bytes=self.settings.max_document_bytes,
            text_field=self.settings.text_field,
            report=report or ReadReport(),
        )

    def _read_all(self) -> Reading:
        """Step 1: count and hash all documents, and choose the threshold between the splits."""
        report = ReadReport()
        digest = CorpusDigest()
        split = SplitRule(self.settings.validation_fraction)
        sizes = [source.get("bytes") for source in self.journal.identity["sources"]]
        total = None if None in sizes else sum(size for size in sizes if size)
        with self.progress.stage("reading", total) as advance:
            for document in self._documents(report):
                content = document.text.encode("utf-8")
                digest.update(content)
                split.add(hash_of(content))
                advance(len(content))
        for message in report.messages:
            self.progress.note(f"skipped: {message}")
        if report.documents == 0:
            raise UserError("the sources hold no text: every document is empty or white space")
        skipped = {
            "empty_documents": report.skipped_empty_documents,
            "binary_files": report.skipped_binary_files,
            "lines": report.skipped_lines,
        }
        threshold = split.threshold(report.text_bytes)
        reading = Reading(report.documents, report.text_bytes, digest.hexdigest(), threshold, skipped)
        self.journal.finish_reading(reading)
        return reading

    def _tokenizer(self, reading: Reading) -> Tokenizer:
        """Step 2: the tokenizer that is there, was given, or is trained now."""
        path = self.settings.out / TOKENIZER_FILE
        if path.is_file():
            return Tokenizer.load(path)
        if self.settings.tokenizer is not None:
            tokenizer = Tokenizer.load(self.settings.tokenizer)
        else:
            # The stage ends when the texts are read; the training proper comes after and is short beside it.
            with self.progress.stage(
                "training tokenizer", min(self.settings.train_bytes, reading.text_bytes)
            ) as advance:
                texts = self._training_texts(reading.threshold, advance)
                tokenizer = train_tokenizer(texts, self.settings.tokenizer_kind, self.settings.vocab_size)
        tokenizer.save(path)
        return tokenizer

    def _training_texts(self, threshold: int, advance: Callable[[int], None]) -> Iterator[str]:
        left = self.settings.train_bytes
        for document in self._documents():
            content = document.text.encode("utf-8")
            if hash_of(content) < threshold:
                continue
            yield document.text
            advance(len(content))
            left -= len(content)
            if left <= 0:
                return

    def _write_shards(self, reading: Reading, tokenizer: Tokenizer) -> None:
        """Step 3: encode what no finished shard holds, and write it."""
        workers = min(self.settings.workers, 1 + reading.text_bytes // BATCH_BYTES)
        digest = CorpusDigest()
        with ExitStack() as stack:
            advance = stack.enter_context(self.progress.stage("encoding", reading.text_bytes))
            writers = {split: stack.enter_context(self._writer(split, tokenizer)) for split in SPLITS}
            batches = self._batches(reading.threshold, digest, advance)
            encoded_batches = stack.enter_context(closing(encode_in_order(batches, tokenizer, workers)))
            for splits_and_sizes, encoded in encoded_batches:
                stop = 0
                for (split, size), length, words in zip(splits_and_sizes, encoded.lengths, encoded.words, strict=True):
                    start, stop = stop, stop + int(length)
                    writers[split].add(encoded.tokens[start:stop], text_bytes=size, words=words)
                    advance(size)
            if digest.hexdigest() != reading.corpus_sha256:
                out = self.settings.out
                raise UserError(f'the sources changed while this build read them: remove "{out}" and build again')

    def _writer(self, split: str, tokenizer: Tokenizer) -> ShardWriter:
        return ShardWriter(
            self.settings.out,
            split,
            vocab_size=tokenizer.vocab_size,
            shard_tokens=self.settings.shard_tokens,
            finished=self.journal.shards[split],
            on_finished=lambda record: self.journal.finish_shard(split, record),
        )

    def _batches(
        self, threshold: int, digest: CorpusDigest, advance: Callable[[int], None]
    ) -> Iterator[tuple[list[tuple[str, int]], list[str]]]:
        """Batches of texts with the split and the size of each; documents of finished shards are only hashed."""
        finished = {split: sum(record.documents for record in self.journal.shards[split]) for split in SPLITS}
        labels: list[tuple[str, int]] = []
        texts: list[str] = []
        waiting_bytes = 0
        for document in self._documents():
            content = document.text.encode("utf-8")
            digest.update(content)
            split = "validation" if hash_of(content) < threshold else "train"
            if finished[split] > 0:
                finished[split] -= 1
                advance(len(content))
                continue
            labels.append((split, len(content)))
            texts.append(document.text)
            waiting_bytes += len(content)
            if waiting_bytes >= BATCH_BYTES:
                yield labels, texts
                labels, texts, waiting_bytes = [], [], 0
        if texts:
            yield labels, texts

    def _manifest(self, reading: Reading, tokenizer: Tokenizer) -> dict[str, Any]:
        """Step 4: nothing in it depends on the time, the place, or the number of workers."""
        identity = self.journal.identity
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "tokenizer": {
                "file": TOKENIZER_FILE,
                "sha256": tokenizer.sha256,
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text_id": tokenizer.end_of_text_id,
            },
            "dtype": token_dtype(tokenizer.vocab_size).name,
            "split_rule": {
                "validation_if": "the first 8 bytes of BLAKE2b (digest size 8) of the text, big-endian, are below",
                "threshold": f"0x{reading.threshold:016x}",
            },
            "normalisation": "newlines to \\n, byte-order mark removed; nothing else",
            "sources": identity["sources"],
            "settings": {name: value for name, value in identity.items() if name != "sources"},
            "skipped": reading.skipped,
            "corpus_sha256": reading.corpus_sha256,
            "splits": {split: split_totals(self.journal.shards[split]) for split in SPLITS},
            "versions": {
                "kindling": _version_of("kindling-lm"),
                "tokenizers": _version_of("tokenizers"),
                "sentencepiece": _version_of("sentencepiece"),
                "python": platform.python_version(),
            },
        }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
