"""Estimate what a build would do from a small sample of its sources, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_prep.cleaning.cleaner import Cleaner, CleaningReport
from data_prep.errors import UserError
from data_prep.pipeline.advice import advice, why_empty
from data_prep.pipeline.build import BuildPlan, as_it_began
from data_prep.pipeline.parts import Job, cleaned_documents
from data_prep.settings import BuildSettings, TokenizerSettings, available_cores
from data_prep.shards.tokens import index_size
from data_prep.sources.formats import PARQUET, is_compressed, kind_of
from data_prep.sources.listing import STDIN, CorpusPart, ReadReport, unread_files
from data_prep.tokenizers.encoders import choose_encoder
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype
from data_prep.tokenizers.training import train_tokenizer

SAMPLED_PARTS, SAMPLED_BYTES = 8, 1 << 21  # number of parts, and bytes of text from all of them
GUESSED_EXPANSION = 3.0  # of compressed files, whose text cannot be measured without decompressing all of it


@dataclass(frozen=True)
class Estimate:
    """What a build would read and write: sizes in bytes, time in seconds.

    ``text_bytes`` is the text after cleaning. ``guessed`` is true if some sources are compressed or of unknown size.
    ``unread_files`` says which files of a folder would be left out because of their names,
    and ``advice`` has what a build would note about its text.
    """

    files: int
    parts: int
    file_bytes: int
    text_bytes: int
    documents: int
    tokens: int
    disk_bytes: int
    seconds: float
    workers: int
    encoder: str
    guessed: bool
    unread_files: str
    advice: list[str]


@dataclass
class _Sample:
    texts: list[str]
    reading: ReadReport
    cleaning: CleaningReport
    read_bytes: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0


def estimate_build(settings: BuildSettings) -> Estimate:
    """Estimate a build from the sizes of the sources and a sample of their text, ignoring duplicates.

    Raises ``UserError`` as a build would, and for standard input, which can be read only once.
    """
    if STDIN in settings.sources:
        raise UserError("--dry-run does not work with standard input, which can be read only once")
    settings = as_it_began(settings)
    plan = BuildPlan.of(settings)
    sample = _sample(plan)
    if not sample.texts:
        raise UserError(f"the sample of the sources contains no text: {why_empty(sample.reading, sample.cleaning)}")
    workers = settings.workers or available_cores()
    began = time.perf_counter()
    tokenizer = plan.tokenizer or _rough_tokenizer(sample.texts, settings.training)
    training_rate = sample.kept_bytes / (time.perf_counter() - began)
    chosen = choose_encoder(tokenizer, sample.texts[:100], settings.encoder)
    began = time.perf_counter()
    _, lengths = chosen.encoder.encode(sample.texts)
    encoding_rate = sample.kept_bytes / (time.perf_counter() - began)

    file_bytes = sum(part.bytes for part in plan.parts)
    unpacked = sum(part.bytes * (GUESSED_EXPANSION if _is_compressed(part) else 1.0) for part in plan.parts)
    text_bytes = int(unpacked * sample.kept_bytes / sample.read_bytes)
    scale = text_bytes / sample.kept_bytes
    documents, tokens = int(scale * len(sample.texts)), int(scale * (int(lengths.sum()) + len(lengths)))
    seconds = (unpacked * sample.seconds / sample.read_bytes + text_bytes / encoding_rate) / workers
    if settings.tokenizer is None:
        seconds += min(settings.training.train_bytes, text_bytes) / training_rate
    return Estimate(
        files=len({each.path for part in plan.parts for each in part.ranges}),
        parts=len(plan.parts),
        file_bytes=file_bytes,
        text_bytes=text_bytes,
        documents=documents,
        tokens=tokens,
        disk_bytes=tokens * token_dtype(tokenizer.vocab_size).itemsize + index_size(documents),
        seconds=seconds,
        workers=workers,
        encoder=chosen.encoder.name,
        guessed=any(_is_compressed(part) or not part.bytes for part in plan.parts),
        unread_files=unread_files(plan.sources, settings.reading.reading_rules),
        advice=list(advice(settings.reading, sample.reading, sample.cleaning, scale)),
    )


def _is_compressed(part: CorpusPart) -> bool:
    return any(is_compressed(each.path) or kind_of(each.path) == PARQUET for each in part.ranges)


def _sample(plan: BuildPlan) -> _Sample:
    job, cleaner = Job(plan.settings, plan.sources), Cleaner(plan.settings.cleaning)
    sample = _Sample([], ReadReport(), cleaner.report)
    began = time.perf_counter()
    parts = plan.parts[:: -(-len(plan.parts) // SAMPLED_PARTS)]
    for part in parts:
        before = sample.reading.text_bytes
        for document in cleaned_documents(job, part, lambda size: None, sample.reading, cleaner):
            sample.texts.append(document.text)
            sample.kept_bytes += len(document.text.encode("utf-8"))
            if sample.reading.text_bytes - before >= SAMPLED_BYTES // len(parts):
                break
        sample.read_bytes += max(sample.reading.text_bytes - before, 1)
    sample.seconds = time.perf_counter() - began
    return sample


def _rough_tokenizer(texts: Sequence[str], settings: TokenizerSettings) -> Tokenizer:
    """Train a tokenizer on the sample, with a smaller vocabulary if the sample is too small."""
    while True:
        try:
            return train_tokenizer(iter(texts), settings)
        except UserError:
            if settings.vocab_size // 2 < settings.smallest_vocabulary:
                raise
            settings = replace(settings, vocab_size=settings.vocab_size // 2)
