"""What is done with one part of the input. A part's results depend on the part and the job alone.

So parts may be worked on in any order, by any process on any machine that sees the files::

    read → clean → leave out duplicates → split → encode → shards, and a record of what was done
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cleaning.cleaner import Cleaner, CleaningReport
from data_prep.cleaning.duplicates import signatures
from data_prep.cleaning.settings import CleaningSettings
from data_prep.files import atomic_file
from data_prep.pipeline.journal import PartRecord
from data_prep.pipeline.splitting import PartDigest, hash_of
from data_prep.pipeline.workers import Advance
from data_prep.shards.tokens import SPLITS, TOKENIZER_FILE, WORK, ShardWriter, count_words
from data_prep.sources.listing import Document, Part, ReadReport, ReadSettings, Source, read_part
from data_prep.tokenizers.encoders import Engine, EngineError, make_engine, recheck
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype

BATCH_BYTES = 1 << 20  # text that is encoded at a time
# Of one document in so many, chosen by its hash, the slow engine encodes the beginning as well.
RECHECKED, RECHECKED_CHARACTERS = 1000, 10_000


@dataclass(frozen=True)
class Job:
    """All that is to be known to work on any part of a build. ``directory`` is the build's own."""

    directory: Path
    sources: tuple[Source, ...]
    reading: ReadSettings
    cleaning: CleaningSettings
    shard_tokens: int
    threshold: int = 0
    encoder: str = ""


def signatures_path(directory: Path, number: int) -> Path:
    return directory / WORK / f"part-{number:05d}.signatures"


def duplicates_path(directory: Path, number: int) -> Path:
    """Where it is kept which documents of a part are duplicates: one byte a document, 1 for those to leave out."""
    return directory / WORK / f"part-{number:05d}.duplicates"


def cleaned_documents(
    job: Job, part: Part, advance: Advance, reading: ReadReport, cleaner: Cleaner
) -> Iterator[Document]:
    """The documents of a part after cleaning, duplicates included."""
    for document in read_part(part, job.sources, job.reading, reading):
        advance(len(document.text))
        text = cleaner.clean(document.text) if cleaner.active else document.text
        if text is document.text:
            yield document
        elif text is not None and text.strip():
            yield Document(text, document.place)


def kept_documents(
    job: Job, number: int, part: Part, advance: Advance, reading: ReadReport, cleaner: Cleaner
) -> Iterator[Document]:
    """The documents of part ``number`` that a model learns from."""
    documents = cleaned_documents(job, part, advance, reading, cleaner)
    how = job.cleaning.duplicates
    if how == "keep":
        yield from documents
        return
    left_out = np.fromfile(duplicates_path(job.directory, number), np.uint8)
    for document, duplicate in zip(documents, left_out, strict=True):
        if duplicate:
            cleaner.report.step(f"{how} duplicates").remove(document.text, f"was there before ({how})")
        else:
            yield document


def survey_part(job: Job, number: int, part: Part, advance: Advance) -> None:
    """Leave the signatures of a part's documents in a file, from which duplicates are found."""
    path = signatures_path(job.directory, number)
    if path.is_file():
        advance(part.bytes)
        return
    cleaner = Cleaner(job.cleaning)
    with atomic_file(path) as file:
        for batch in _batches(cleaned_documents(job, part, advance, ReadReport(), cleaner)):
            file.write(signatures([document.text for document in batch], job.cleaning.duplicates, job.cleaning))


def build_part(job: Job, number: int, part: Part, advance: Advance) -> PartRecord:
    """Make the shards of part ``number``, or go on where an interrupted call left it."""
    record = PartRecord.open(job.directory, number)
    if record.summary is not None:
        advance(part.bytes)
        return record
    tokenizer, engine = _encoder(job.directory, job.encoder)
    encode = _BatchEncoder(tokenizer, engine)
    cleaner, reading, digest = Cleaner(job.cleaning), ReadReport(), PartDigest()
    finished = {split: sum(shard.documents for shard in record.shards[split]) for split in SPLITS}
    ended = False

    def writer(split: str) -> ShardWriter:
        return ShardWriter(
            job.directory,
            split,
            vocab_size=tokenizer.vocab_size,
            part=number,
            source=part.source,
            shard_tokens=job.shard_tokens,
            finished=record.shards[split],
            on_finished=lambda shard: record.finish_shard(split, shard, is_last=ended),
        )

    with ExitStack() as stack:
        writers = {split: stack.enter_context(writer(split)) for split in SPLITS}
        for batch in _batches(kept_documents(job, number, part, advance, reading, cleaner)):
            contents = [document.text.encode("utf-8") for document in batch]
            hashes = [hash_of(content) for content in contents]
            digest.update(contents, hashes)
            wanted: list[int] = []
            for place, document_hash in enumerate(hashes):
                split = _split_of(document_hash, job.threshold)
                if finished[split]:
                    finished[split] -= 1
                else:
                    wanted.append(place)
            encoded = encode([batch[place].text for place in wanted])
            for place, tokens in zip(wanted, encoded, strict=True):
                content = contents[place]
                writers[_split_of(hashes[place], job.threshold)].add(
                    tokens, text_bytes=len(content), words=count_words(content), place=batch[place].place
                )
            again = [batch[place].text for place in wanted if not hashes[place] % RECHECKED]
            recheck(engine, tokenizer, [text[:RECHECKED_CHARACTERS] for text in again])
        ended = True
    reports = {"reading": reading.to_json(), "cleaning": cleaner.report.to_json()}
    record.finish({"digest": digest.hexdigest()} | reports)
    return record


def _split_of(document_hash: int, threshold: int) -> str:
    return "validation" if document_hash < threshold else "train"


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# The encoder of the build that this process works on: loading one costs as much as encoding 20 MB.
_encoders: dict[tuple[Path, str], tuple[Tokenizer, Engine]] = {}


def keep_encoder(directory: Path, tokenizer: Tokenizer, engine: Engine) -> None:
    """Let the parts of a build in this process use what has been loaded already."""
    _encoders.clear()
    _encoders[directory, engine.short_name] = tokenizer, engine


def _encoder(directory: Path, name: str) -> tuple[Tokenizer, Engine]:
    if (directory, name) not in _encoders:
        tokenizer = load_tokenizer(directory / TOKENIZER_FILE)
        keep_encoder(directory, tokenizer, make_engine(name, tokenizer))
    return _encoders[directory, name]


class _BatchEncoder:
    """Texts to token arrays of the shards' dtype, the end-of-text token after each."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine) -> None:
        self._engine = engine
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end_of_text = np.array([tokenizer.end_of_text_id], self._dtype).tobytes()

    def __call__(self, texts: list[str]) -> Iterator[np.ndarray]:
        ids, lengths = self._encode(texts)
        content, size = memoryview(ids.tobytes()), self._dtype.itemsize
        start = 0
        for length in lengths.tolist():
            stop = start + length * size
            yield np.frombuffer(b"".join((content[start:stop], self._end_of_text)), self._dtype)
            start = stop

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self._engine.encode(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise EngineError(
                f"the encoder {self._engine.name} failed ({reason}): call again with --encoder tokenizers"
            ) from error


def digest_of_parts(summaries: list[dict[str, Any]]) -> str:
    """SHA-256 over the digests of all parts in order: the identity of the text of a whole corpus."""
    return hashlib.sha256("".join(summary["digest"] for summary in summaries).encode("ascii")).hexdigest()


def merged_reports(summaries: list[dict[str, Any]]) -> tuple[ReadReport, CleaningReport]:
    reading, cleaning = ReadReport(), CleaningReport()
    for summary in summaries:
        reading.merge(ReadReport.from_json(summary["reading"]))
        cleaning.merge(CleaningReport.from_json(summary["cleaning"]))
    return reading, cleaning
