"""Build a dataset: sources → parts → cleaning → tokenizer → shards. A build killed at any moment can be resumed.

A resumed build skips the steps that are done:

1. Divide the sources into parts, by names and sizes only.
2. To drop duplicates: read all parts, and find duplicates across the whole corpus.
3. Choose the threshold between training and validation: the first documents suffice, unless the corpus is tiny.
4. Train the tokenizer on training documents, and find the fastest encoder that is exact for it.
5. Make the shards of every part, in worker processes or on a Ray cluster.
6. Write the manifest and remove all temporary files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.cleaning.cleaner import Cleaner
from data_prep.cleaning.duplicates import find_duplicates
from data_prep.errors import UserError
from data_prep.files import atomic_file, write_atomically
from data_prep.pipeline.advice import advice, removals, why_empty
from data_prep.pipeline.journal import Journal, PartRecord
from data_prep.pipeline.parts import Job, build_part, keep_encoder, kept_documents, merged, part_path, survey_part
from data_prep.pipeline.resuming import STDIN_COPY, build_or_resume, part_size, refuse_changed_sources, stamp_of
from data_prep.pipeline.splitting import SplitRule, hash_of
from data_prep.pipeline.workers import Advance, run_calls
from data_prep.progress import ConsoleReporter, Reporter
from data_prep.settings import KEEP, READING_RULES, BuildSettings, available_cores
from data_prep.shards.images import holds_images
from data_prep.shards.manifest import make_manifest
from data_prep.shards.tokens import MANIFEST, SPLITS, TOKENIZER_FILE, Dataset, open_dataset
from data_prep.sources.documents import CorpusPart, ReadReport, Source
from data_prep.sources.listing import STDIN, copy_stdin, describe, parse_sources, parts_of, unread_files
from data_prep.tokenizers.encoders import choose_encoder
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer

PROVED_DOCUMENTS, PROVED_CHARACTERS = 300, 1000  # the first ones, on which encoders are compared


@dataclass(frozen=True)
class BuildPlan:
    """The sources and parts of a build, the tokenizer if one was given, and everything that determines the result."""

    settings: BuildSettings
    sources: tuple[Source, ...]
    parts: tuple[CorpusPart, ...]
    tokenizer: Tokenizer | None
    identity: dict[str, Any]

    @classmethod
    def of(cls, settings: BuildSettings, stdin_copy: Path | None = None) -> BuildPlan:
        """Plan a build. Raises ``UserError`` for invalid settings and for missing sources.

        Without ``stdin_copy``, the file that standard input was copied to, standard input has no parts yet.
        """
        settings.check()
        sources = tuple(parse_sources(settings.sources))
        for source in sources:
            if holds_images(source.location):
                raise UserError(f'"{source.location}" is a dataset of images, which has no text: name another source')
        parts = parts_of(sources, settings.reading, stdin_copy)
        part_bytes = part_size(sum(part.bytes for part in parts))
        if part_bytes < settings.reading.part_bytes:
            settings = replace(settings, reading=replace(settings.reading, part_bytes=part_bytes))
            parts = parts_of(sources, settings.reading, stdin_copy)
        tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
        identity = {
            **(settings.training.identity() if tokenizer is None else {"tokenizer_sha256": tokenizer.sha256}),
            **asdict(settings.reading),
            **settings.cleaning.identity(),
            "sources": describe(sources, parts),
            "validation_fraction": settings.validation_fraction,
            "shard_tokens": settings.shard_tokens,
        }
        if tokenizer is not None and tokenizer.cuts_names:  # earlier versions gave such names the ids of the tokens
            identity["cuts_names"] = True
        if settings.reading.reading_rules == 1:
            del identity["reading_rules"]
        return cls(settings, sources, tuple(parts), tokenizer, json.loads(json.dumps(identity)))

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files, or None if the size of one is unknown."""
        return None if any(not part.bytes for part in self.parts) else sum(part.bytes for part in self.parts)

    def stamp(self) -> str:
        """Return a fingerprint of the names, sizes and modification times of all local files."""
        return stamp_of(each.path for part in self.parts for each in part.ranges)


def build(
    sources: Sequence[str | Path], out: str | Path, *, progress: Reporter | None = None, **settings: Any
) -> Dataset:
    """Build the dataset ``out`` from text, or resume an interrupted build there, and open it.

    Args:
        sources: files, folders, patterns, "builtin", "hf:NAME" and so on, as on the command line.
        progress: where progress goes, by default to the terminal or notebook; pass
            ``data_prep.progress.SilentReporter()`` to hide it.
        settings: any setting in ``data_prep.settings`` by name, for example ``vocab_size=8192``; the defaults are those
            of the command line.

    Raises:
        UserError: a setting or source is invalid, or the build cannot be completed. A new build that fails before its
            first part is done leaves nothing behind.
    """
    made = BuildSettings.from_options(sources, out, **settings)
    build_dataset(made, progress=progress or ConsoleReporter())
    return open_dataset(made.out)


def build_dataset(settings: BuildSettings, *, progress: Reporter) -> dict[str, Any]:
    """Build or resume the dataset in ``settings.out``, and return its manifest.

    A finished dataset with the same settings is left unchanged. Raises ``UserError`` as ``build`` does.
    """
    settings = as_it_began(settings)
    plan = BuildPlan.of(settings)
    return build_or_resume(
        settings.out,
        plan.identity,
        stamp=plan.stamp,
        finished=lambda: open_dataset(settings.out).manifest,
        run=lambda journal: _Build(plan, journal, progress).run(),
        progress=progress,
    )


def as_it_began(settings: BuildSettings) -> BuildSettings:
    """Return the settings with what the dataset or build in ``settings.out`` began with, where defaults have changed.

    These are the rules of reading and, unless it is named, the word split.
    """
    out = settings.out
    if (out / MANIFEST).is_file():
        identity = open_dataset(out).manifest["settings"]
    elif journal := Journal.load(out):
        identity = journal.identity
    else:
        return settings
    rules = min(identity.get("reading_rules", 1), READING_RULES)
    split = settings.training.word_split
    split = identity.get("word_split", split) if split == "auto" else split
    return replace(
        settings,
        reading=replace(settings.reading, reading_rules=rules),
        training=replace(settings.training, word_split=split),
    )


@dataclass
class _Build:
    plan: BuildPlan
    journal: Journal
    progress: Reporter

    def run(self) -> dict[str, Any]:
        out = self.plan.settings.out
        if any(source.location == STDIN for source in self.plan.sources):
            with atomic_file(out / STDIN_COPY) as file:
                copy_stdin(file, self.plan.settings.reading.reading_rules)
            self.plan = BuildPlan.of(self.plan.settings, out / STDIN_COPY)
        self._find_duplicates()
        self._settle_split()
        tokenizer = self._tokenizer()
        self._choose_encoder(tokenizer)
        return self._build_parts(tokenizer)

    def _find_duplicates(self) -> None:
        """Step 2. The results are files next to the records of the parts."""
        how, out = self.plan.settings.cleaning.duplicates, self.plan.settings.out
        found = [part_path(out, number, "duplicates") for number in range(len(self.plan.parts))]
        if how == KEEP or all(path.is_file() for path in found):
            return
        self._run("looking for duplicates", survey_part)
        signatures = [path.with_suffix(".signatures") for path in found]
        for path, duplicates in zip(found, find_duplicates(signatures, how, self.plan.settings.cleaning), strict=True):
            write_atomically(path, duplicates.astype("u1").tobytes())

    def _run(self, stage: str, function: Callable[..., Any]) -> list[Any]:
        settings = self.plan.settings
        job = Job(settings, self.plan.sources, self.journal.threshold or 0, self.journal.encoder)
        calls = [(job, number, part) for number, part in enumerate(self.plan.parts)]
        with self.progress.stage(stage, self.plan.total_bytes) as advance:
            workers = settings.workers or available_cores()
            return run_calls(function, calls, engine=settings.engine, workers=workers, advance=advance)

    def _texts(self, reading: ReadReport, cleaner: Cleaner) -> Iterator[str]:
        """Yield the texts of all documents, in order, and fill the reports."""
        job = Job(self.plan.settings, self.plan.sources)
        for number, part in enumerate(self.plan.parts):
            for document in kept_documents(job, number, part, lambda size: None, reading, cleaner):
                yield document.text

    def _training_texts(
        self, advance: Advance = lambda size: None, reading: ReadReport | None = None, cleaner: Cleaner | None = None
    ) -> Iterator[str]:
        assert self.journal.threshold is not None
        for text in self._texts(reading or ReadReport(), cleaner or Cleaner(self.plan.settings.cleaning)):
            content = text.encode("utf-8")
            if hash_of(content) >= self.journal.threshold:
                yield text
                advance(len(content))

    def _settle_split(self) -> None:
        """Step 3: read until each side of the threshold has a document, or to the end."""
        if self.journal.threshold is not None:
            return
        split, text_bytes, any_text = SplitRule(self.plan.settings.validation_fraction), 0, False
        reading, cleaner = ReadReport(), Cleaner(self.plan.settings.cleaning)
        for text in self._texts(reading, cleaner):
            content = text.encode("utf-8")
            split.add(hash_of(content))
            text_bytes += len(content)
            any_text = True
            if split.settled:
                break
        if not any_text:
            raise UserError(f"the sources contain no text: {why_empty(reading, cleaner.report)}")
        self.journal.threshold = split.threshold(text_bytes, "; ".join(removals(reading, cleaner.report)))
        self.journal.save()

    def _tokenizer(self) -> Tokenizer:
        """Step 4: return the tokenizer that exists, was given, or is trained now."""
        path = self.plan.settings.out / TOKENIZER_FILE
        if path.is_file():
            return load_tokenizer(path)
        tokenizer = self.plan.tokenizer
        if tokenizer is None and self.plan.settings.training.tokenizer_kind == "bytes":
            tokenizer = train_tokenizer(iter(()), self.plan.settings.training)
        elif tokenizer is None:
            # The stage covers reading the texts; the training itself follows and is short in comparison.
            reading, cleaner = ReadReport(), Cleaner(self.plan.settings.cleaning)
            with self.progress.stage("training tokenizer", None) as advance:
                try:
                    texts = self._training_texts(advance, reading, cleaner)
                    tokenizer = train_tokenizer(texts, self.plan.settings.training)
                except UserError as error:  # perhaps because cleaning left too little text
                    raise UserError("; ".join([str(error), *removals(reading, cleaner.report)])) from None
        tokenizer.save(path)
        return tokenizer

    def _choose_encoder(self, tokenizer: Tokenizer) -> None:
        if self.journal.encoder and self.plan.settings.encoder in ("auto", self.journal.encoder):
            return
        sample = [text[:PROVED_CHARACTERS] for text in islice(self._training_texts(), PROVED_DOCUMENTS)]
        chosen = choose_encoder(tokenizer, sample, self.plan.settings.encoder)
        keep_encoder(self.plan.settings.out, tokenizer, chosen.encoder)
        self.journal.encoder = chosen.encoder.short_name
        self.journal.encoders = dict(chosen.tried)
        self.journal.save()
        others = "; ".join(f"{name}: {outcome}" for name, outcome in chosen.tried if name != chosen.encoder.name)
        self.progress.note(f"encoder: {chosen.encoder.name}, exact" + (f" ({others})" if others else ""))

    def _build_parts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Step 5. Return the manifest, which does not depend on the time, the machine, or the number of workers."""
        records: list[PartRecord] = self._run("encoding", build_part)
        reading, cleaning, corpus_sha256 = merged([record.summary for record in records if record.summary])
        for message in reading.messages:
            self.progress.note(f"left out: {message}")
        for sentence in advice(self.plan.settings.reading, reading, cleaning):
            self.progress.note(f"note: {sentence}")
        if unread := unread_files(self.plan.sources, self.plan.settings.reading.reading_rules):
            self.progress.note(f"left out: {unread}")
        refuse_changed_sources(self.plan.settings.out, self.plan.stamp(), self.journal)
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
            corpus_sha256=corpus_sha256,
            encoders=self.journal.encoders,
        )
