"""Build a dataset: sources → parts → cleaning → tokenizer → shards. Killed at any moment, it can go on.

The steps, each of which a later call skips if it is done:

1. Cut the sources into parts, by names and sizes only.
2. Where duplicates are to go: read all parts, and find them over the whole corpus.
3. Fix the border between training and validation: the first documents tell, unless the corpus is tiny.
4. Train the tokenizer on training documents, and prove the fastest encoder that is exact for it.
5. Make the shards of every part, in worker processes or on a Ray cluster.
6. Write the manifest and remove everything else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.cleaning.cleaner import Cleaner
from data_prep.cleaning.duplicates import find_duplicates
from data_prep.cleaning.settings import CleaningSettings
from data_prep.errors import UserError
from data_prep.files import atomic_file, empty_directory, only_writer_of, write_atomically
from data_prep.pipeline.journal import Journal, PartRecord, differences
from data_prep.pipeline.parts import (
    Job,
    build_part,
    digest_of_parts,
    duplicates_path,
    keep_encoder,
    kept_documents,
    merged_reports,
    signatures_path,
    survey_part,
)
from data_prep.pipeline.splitting import SplitRule, hash_of
from data_prep.pipeline.workers import EXECUTORS, Executor, run_calls
from data_prep.progress import Reporter, SilentReporter
from data_prep.shards.manifest import make_manifest, save_manifest
from data_prep.shards.tokens import (
    DEFAULT_SHARD_TOKENS,
    JOURNAL,
    LARGEST_SHARD_TOKENS,
    MANIFEST,
    SPLITS,
    TOKENIZER_FILE,
    WORK,
    open_dataset,
)
from data_prep.sources.listing import (
    STDIN,
    Part,
    ReadReport,
    ReadSettings,
    Source,
    copy_stdin,
    describe,
    parse_sources,
    parts_of,
)
from data_prep.tokenizers.encoders import choose_engine
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import TokenizerSettings, train_tokenizer

STDIN_COPY = "stdin.txt"
# The encoders are compared on the beginnings of so many documents, in characters.
PROVED_DOCUMENTS, PROVED_CHARACTERS = 300, 1000
SMALLEST_PART_BYTES = 1 << 20
# A corpus has at least so many parts, if each can be that large: work for several processes.
LEAST_PARTS = 16


@dataclass(frozen=True)
class BuildSettings:
    """All that a build can be told. ``workers``, ``engine`` and ``encoder`` do not change the result."""

    sources: tuple[str, ...]
    out: Path
    reading: ReadSettings = field(default_factory=ReadSettings)
    cleaning: CleaningSettings = field(default_factory=CleaningSettings)
    training: TokenizerSettings = field(default_factory=TokenizerSettings)
    #: A tokenizer to use instead of training one: a tokenizer.json, a sentencepiece .model, a folder, a hub name.
    tokenizer: str | None = None
    #: The share of documents that is kept for validation, at least 0 and below 1.
    validation_fraction: float = 0.05
    #: Most tokens in one shard.
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    workers: int = 1
    engine: Executor = "local"
    #: The encoder to use: "auto", or the short name of one, which must be exact for the tokenizer.
    encoder: str = "auto"

    @classmethod
    def from_options(cls, sources: Sequence[str], out: Path, **options: Any) -> BuildSettings:
        """Settings of which each option names a field here, or of reading, cleaning or training."""

        def taken(kind: Any) -> Any:
            return kind(**{name.name: options.pop(name.name) for name in fields(kind) if name.name in options})

        parts = {"reading": taken(ReadSettings), "cleaning": taken(CleaningSettings)}
        return cls(tuple(sources), out, training=taken(TokenizerSettings), **parts, **options)

    def check(self) -> None:
        """Raise ``UserError`` with a line for each setting that cannot be."""
        problems = [*self.reading.check(), *self.cleaning.check()]
        if self.tokenizer is None:
            problems += self.training.check()
        if not 0 <= self.validation_fraction < 1:
            problems.append(f"--validation-fraction {self.validation_fraction} must be at least 0 and below 1")
        if not 1 <= self.shard_tokens <= LARGEST_SHARD_TOKENS:
            problems.append(f"--shard-tokens must be from 1 to {LARGEST_SHARD_TOKENS}")
        if self.workers < 1:
            problems.append("--workers must be at least 1")
        if self.engine not in EXECUTORS:
            problems.append(f'unknown engine "{self.engine}": choose {" or ".join(EXECUTORS)}')
        if problems:
            raise UserError("\n".join(problems))

    @cached_property
    def given_tokenizer(self) -> Tokenizer | None:
        return None if self.tokenizer is None else load_tokenizer(self.tokenizer)


@dataclass(frozen=True)
class Plan:
    """The sources of a build and its parts, and what decides its result."""

    settings: BuildSettings
    sources: tuple[Source, ...]
    parts: tuple[Part, ...]
    identity: dict[str, Any]

    @classmethod
    def of(cls, settings: BuildSettings, stdin_copy: Path | None = None) -> Plan:
        """Raises ``UserError`` for settings that cannot be, and for sources that are not there.

        Without ``stdin_copy``, a file that holds it, standard input has no parts yet.
        """
        settings.check()
        sources = tuple(parse_sources(settings.sources))
        parts = parts_of(sources, settings.reading, stdin_copy)
        # The size of parts follows from the size of the corpus, never from the number of workers.
        share = sum(part.bytes for part in parts) // LEAST_PARTS
        part_bytes = max(share, SMALLEST_PART_BYTES)
        if part_bytes < settings.reading.part_bytes:
            settings = replace(settings, reading=replace(settings.reading, part_bytes=part_bytes))
            parts = parts_of(sources, settings.reading, stdin_copy)
        tokenizer = settings.given_tokenizer
        identity = {
            **(settings.training.identity() if tokenizer is None else {"tokenizer_sha256": tokenizer.sha256}),
            **asdict(settings.reading),
            **settings.cleaning.identity(),
            "sources": describe(sources, parts),
            "validation_fraction": settings.validation_fraction,
            "shard_tokens": settings.shard_tokens,
        }
        return cls(settings, sources, tuple(parts), json.loads(json.dumps(identity)))

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files, None if one is of unknown size."""
        return None if any(not part.bytes for part in self.parts) else sum(part.bytes for part in self.parts)

    def stamp(self) -> str:
        """A fingerprint of names, sizes and times of change of all local files."""
        digest = hashlib.sha256()
        for path in sorted({span.path for part in self.parts for span in part.spans}):
            if Path(path).is_file() and not path.endswith(STDIN_COPY):
                status = Path(path).stat()
                digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def job(self, **found: Any) -> Job:
        settings = self.settings
        return Job(settings.out, self.sources, settings.reading, settings.cleaning, settings.shard_tokens, **found)


def build(settings: BuildSettings, *, progress: Reporter | None = None) -> dict[str, Any]:
    """Build the dataset in ``settings.out``, or go on with an interrupted build there; returns its manifest.

    A dataset that is already there with the same settings is left as it is. Raises ``UserError``; a new build that
    fails before its first part is done leaves nothing behind.
    """
    progress = progress or SilentReporter()
    plan = Plan.of(settings)
    out = settings.out
    if out.exists() and not out.is_dir():
        raise UserError(f'"{out}" is a file: choose another --out')
    created = _make_directories(out)
    with only_writer_of(out, f'another build is writing "{out}": wait for it, or choose another --out'):
        if (out / MANIFEST).is_file():
            return _finished(out, plan.identity, progress)
        journal = Journal.load(out)
        if journal is not None:
            _refuse_other_settings(out, journal.identity, plan.identity)
            _refuse_changed_sources(plan, journal)
            progress.note(f'going on with the build in "{out}"')
            return _Build(plan, journal, progress).run()
        _refuse_other_files(out)
        try:
            return _Build(plan, Journal(out / JOURNAL, plan.identity, plan.stamp()), progress).run()
        except UserError:
            if not any(out.glob(f"{WORK}/part-*.json")):
                empty_directory(out)
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
    _remove_work(out)  # a build killed between its last two steps leaves it
    progress.note(f'"{out}" is already built with these settings: nothing to do')
    return manifest


def _remove_work(out: Path) -> None:
    (out / STDIN_COPY).unlink(missing_ok=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / JOURNAL).unlink(missing_ok=True)


def _refuse_other_settings(out: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    changes = "; ".join(differences(there, asked))
    if changes:
        raise UserError(f'"{out}" holds a build with other settings ({changes}): choose another --out')


def _refuse_changed_sources(plan: Plan, journal: Journal) -> None:
    if plan.stamp() != journal.stamp:
        out = plan.settings.out
        raise UserError(f'the sources changed since the build in "{out}" began: remove "{out}" and build again')


def _refuse_other_files(out: Path) -> None:
    # A build killed at its very first write leaves the journal's temporary file.
    others = [path.name for path in out.iterdir() if path.name != f"{JOURNAL}.tmp"]
    if others:
        raise UserError(f'"{out}" is not empty (it holds "{min(others)}") and holds no build: choose another --out')


@dataclass
class _Build:
    plan: Plan
    journal: Journal
    progress: Reporter

    def run(self) -> dict[str, Any]:
        out = self.plan.settings.out
        self.journal.save()
        (out / WORK).mkdir(exist_ok=True)
        if any(source.location == STDIN for source in self.plan.sources):
            self._keep_stdin()
        self._find_duplicates()
        self._settle_split()
        tokenizer = self._tokenizer()
        self._choose_encoder(tokenizer)
        records = self._build_parts()
        _refuse_changed_sources(self.plan, self.journal)
        manifest = self._manifest(tokenizer, records)
        save_manifest(out, manifest)
        _remove_work(out)
        return manifest

    def _keep_stdin(self) -> None:
        with atomic_file(self.plan.settings.out / STDIN_COPY) as file:
            copy_stdin(file)
        self.plan = Plan.of(self.plan.settings, self.plan.settings.out / STDIN_COPY)

    def _find_duplicates(self) -> None:
        """Step 2. Its results are files beside the parts' records."""
        how, out = self.plan.settings.cleaning.duplicates, self.plan.settings.out
        numbers = range(len(self.plan.parts))
        if how == "keep" or all(duplicates_path(out, number).is_file() for number in numbers):
            return
        self._run("looking for duplicates", survey_part)
        paths = [signatures_path(out, number) for number in numbers]
        for number, duplicates in enumerate(find_duplicates(paths, how, self.plan.settings.cleaning)):
            write_atomically(duplicates_path(out, number), duplicates.astype("u1").tobytes())

    def _run(self, stage: str, function: Callable[..., Any]) -> list[Any]:
        settings = self.plan.settings
        job = self.plan.job(threshold=self.journal.threshold or 0, encoder=self.journal.encoder)
        calls = [(job, number, part) for number, part in enumerate(self.plan.parts)]
        with self.progress.stage(stage, self.plan.total_bytes) as advance:
            return run_calls(function, calls, engine=settings.engine, workers=settings.workers, advance=advance)

    def _texts(self) -> Iterator[str]:
        """All documents to learn from, in order."""
        job = self.plan.job()
        cleaner = Cleaner(job.cleaning)
        for number, part in enumerate(self.plan.parts):
            for document in kept_documents(job, number, part, lambda size: None, ReadReport(), cleaner):
                yield document.text

    def _training_texts(self) -> Iterator[str]:
        assert self.journal.threshold is not None
        return (text for text in self._texts() if hash_of(text.encode("utf-8")) >= self.journal.threshold)

    def _settle_split(self) -> None:
        """Step 3: read until a document has been seen on each side of the border, or all of them."""
        if self.journal.threshold is not None:
            return
        split, text_bytes, any_text = SplitRule(self.plan.settings.validation_fraction), 0, False
        for text in self._texts():
            content = text.encode("utf-8")
            split.add(hash_of(content))
            text_bytes += len(content)
            any_text = True
            if split.settled:
                break
        if not any_text:
            raise UserError("the sources hold no text: every document is empty, white space, or was left out")
        self.journal.threshold = split.threshold(text_bytes)
        self.journal.save()

    def _tokenizer(self) -> Tokenizer:
        """Step 4: the tokenizer that is there, was given, or is trained now."""
        path = self.plan.settings.out / TOKENIZER_FILE
        if path.is_file():
            return load_tokenizer(path)
        tokenizer = self.plan.settings.given_tokenizer
        if tokenizer is None and self.plan.settings.training.kind == "bytes":
            tokenizer = train_tokenizer(iter(()), self.plan.settings.training)
        elif tokenizer is None:
            # The stage ends when the texts are read; the training proper comes after and is short beside it.
            with self.progress.stage("training tokenizer", None) as advance:
                tokenizer = train_tokenizer(self._first_training_texts(advance), self.plan.settings.training)
        tokenizer.save(path)
        return tokenizer

    def _first_training_texts(self, advance: Callable[[int], None]) -> Iterator[str]:
        left = self.plan.settings.training.train_bytes
        for text in self._training_texts():
            size = len(text.encode("utf-8"))
            yield text
            advance(size)
            left -= size
            if left <= 0:
                return

    def _choose_encoder(self, tokenizer: Tokenizer) -> None:
        if self.journal.encoder and self.plan.settings.encoder in ("auto", self.journal.encoder):
            return
        sample = [text[:PROVED_CHARACTERS] for text in islice(self._training_texts(), PROVED_DOCUMENTS)]
        chosen = choose_engine(tokenizer, sample, self.plan.settings.encoder)
        keep_encoder(self.plan.settings.out, tokenizer, chosen.engine)
        self.journal.encoder = chosen.engine.short_name
        self.journal.encoders = dict(chosen.tried)
        self.journal.save()
        self.progress.note(f"encoder: {chosen.engine.name} ({'; '.join(f'{k}: {v}' for k, v in chosen.tried)})")

    def _build_parts(self) -> list[PartRecord]:
        """Step 5."""
        records: list[PartRecord] = self._run("encoding", build_part)
        reading, _ = merged_reports([record.summary for record in records if record.summary])
        for message in reading.messages:
            self.progress.note(f"left out: {message}")
        return records

    def _manifest(self, tokenizer: Tokenizer, records: list[PartRecord]) -> dict[str, Any]:
        """Step 6: nothing in it depends on the time, the place, or the number of workers."""
        summaries = [record.summary for record in records if record.summary is not None]
        reading, cleaning = merged_reports(summaries)
        settings = dict(self.journal.identity)
        return make_manifest(
            tokenizer,
            {split: [shard for record in records for shard in record.shards[split]] for split in SPLITS},
            split_rule={
                "validation_if": "the first 8 bytes of BLAKE2b (digest size 8) of the text, big-endian, are below",
                "threshold": f"0x{self.journal.threshold:016x}",
            },
            sources=settings.pop("sources"),
            settings=settings,
            left_out=reading.counts,
            cleaning=cleaning.to_json(),
            corpus_sha256=digest_of_parts(summaries),
            encoders=self.journal.encoders,
        )
