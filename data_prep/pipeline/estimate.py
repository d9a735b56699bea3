"""What a build would do, from a small sample of its sources: nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.cleaning.cleaner import Cleaner
from data_prep.errors import UserError
from data_prep.pipeline.build import BuildSettings, Plan
from data_prep.pipeline.parts import cleaned_documents
from data_prep.shards.tokens import index_size
from data_prep.sources.listing import STDIN, Part, ReadReport
from data_prep.tokenizers.encoders import choose_engine
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype
from data_prep.tokenizers.training import TokenizerSettings, train_tokenizer

SAMPLED_PARTS, SAMPLED_BYTES = 8, 1 << 18  # from so many parts, so much text of each
PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".parquet")
GUESSED_EXPANSION = 3.0  # of packed files, whose text cannot be measured without unpacking all of it


@dataclass(frozen=True)
class Estimate:
    """Sizes are in bytes (of text, a character is taken for a byte), times in seconds. ``text_bytes`` is what is left
    after cleaning; ``guessed`` says that packed files, or sources of unknown size, are among the sources."""

    files: int
    parts: int
    file_bytes: int
    text_bytes: int
    documents: int
    tokens: int
    disk_bytes: int
    seconds: float
    encoder: str
    guessed: bool


@dataclass
class _Sample:
    texts: list[str]
    read_bytes: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0


def estimate(settings: BuildSettings) -> Estimate:
    """Look at the sources and at a sample of their text. Duplicates are not looked for.

    Raises ``UserError`` as a build would, and for standard input, which can be read only once.
    """
    if STDIN in settings.sources:
        raise UserError("--dry-run cannot look at standard input: it can be read only once")
    plan = Plan.of(settings)
    sample = _sample(plan)
    if not sample.texts:
        raise UserError("the sample of the sources holds no text: every document is empty, white space, or left out")
    began = time.perf_counter()
    tokenizer = settings.given_tokenizer or _rough_tokenizer(sample.texts, settings.training)
    training_rate = sample.kept_bytes / (time.perf_counter() - began)
    chosen = choose_engine(tokenizer, sample.texts[:100], settings.encoder)
    began = time.perf_counter()
    _, lengths = chosen.engine.encode(sample.texts)
    encoding_rate = sample.kept_bytes / (time.perf_counter() - began)

    file_bytes = sum(part.bytes for part in plan.parts)
    unpacked = sum(part.bytes * (GUESSED_EXPANSION if _is_packed(part) else 1.0) for part in plan.parts)
    text_bytes = int(unpacked * sample.kept_bytes / sample.read_bytes)
    scale = text_bytes / sample.kept_bytes
    documents, tokens = int(scale * len(sample.texts)), int(scale * (int(lengths.sum()) + len(lengths)))
    seconds = (unpacked * sample.seconds / sample.read_bytes + text_bytes / encoding_rate) / settings.workers
    if settings.tokenizer is None:
        seconds += min(settings.training.train_bytes, text_bytes) / training_rate
    return Estimate(
        files=len({span.path for part in plan.parts for span in part.spans}),
        parts=len(plan.parts),
        file_bytes=file_bytes,
        text_bytes=text_bytes,
        documents=documents,
        tokens=tokens,
        disk_bytes=tokens * token_dtype(tokenizer.vocab_size).itemsize + index_size(documents),
        seconds=seconds,
        encoder=chosen.engine.name,
        guessed=any(_is_packed(part) or not part.bytes for part in plan.parts),
    )


def _is_packed(part: Part) -> bool:
    return any(Path(span.path).suffix in PACKED_SUFFIXES for span in part.spans)


def _sample(plan: Plan) -> _Sample:
    sample = _Sample([])
    began = time.perf_counter()
    step = -(-len(plan.parts) // SAMPLED_PARTS)
    for part in plan.parts[::step]:
        _sample_part(plan, part, sample)
    sample.seconds = time.perf_counter() - began
    return sample


def _sample_part(plan: Plan, part: Part, sample: _Sample) -> None:
    read = 0

    def advance(size: int) -> None:
        nonlocal read
        read += size

    cleaner = Cleaner(plan.settings.cleaning)
    for document in cleaned_documents(plan.job(), part, advance, ReadReport(), cleaner):
        sample.texts.append(document.text)
        sample.kept_bytes += len(document.text)
        if read >= SAMPLED_BYTES:
            break
    sample.read_bytes += max(read, 1)


def _rough_tokenizer(texts: Sequence[str], settings: TokenizerSettings) -> Tokenizer:
    """A tokenizer trained on the sample, with a smaller vocabulary if the sample cannot fill the wanted one."""
    while True:
        try:
            return train_tokenizer(iter(texts), settings)
        except UserError:
            if settings.vocab_size // 2 < settings.smallest_vocabulary:
                raise
            settings = replace(settings, vocab_size=settings.vocab_size // 2)
