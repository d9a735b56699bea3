"""Process one part of the input. The result depends only on the part and the job.

Parts can therefore be processed in any order, by any process on any machine that can access the files::

    read → clean → drop duplicates → split → encode → shards, and a record of what was done
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cleaning.cleaner import Cleaner, CleaningReport
from data_prep.cleaning.duplicates import signatures
from data_prep.files import atomic_file
from data_prep.pipeline.journal import PartRecord
from data_prep.pipeline.splitting import PartDigest, hash_of
from data_prep.pipeline.workers import Advance
from data_prep.settings import CleaningSettings, ReadSettings
from data_prep.shards.tokens import SPLITS, TOKENIZER_FILE, WORK, ShardWriter, count_words
from data_prep.sources.documents import CorpusPart, Document, ReadReport, Source
from data_prep.sources.reading import read_part
from data_prep.sources.records import first_line
from data_prep.tokenizers.encoders import Encoder, EncoderError, make_encoder, recheck
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype

BATCH_BYTES = 1 << 20  # of text encoded at a time
# The slow encoder also encodes the first characters of one document in a thousand, chosen by hash.
RECHECKED, RECHECKED_CHARACTERS = 1000, 10_000


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to process any part of a build in ``directory``."""

    directory: Path
    sources: tuple[Source, ...]
    reading: ReadSettings
    cleaning: CleaningSettings
    shard_tokens: int
    threshold: int = 0
    encoder: str = ""


def signatures_path(directory: Path, number: int) -> Path:
    """Return the file with the signatures of a part's documents."""
    return directory / WORK / f"part-{number:05d}.signatures"


def duplicates_path(directory: Path, number: int) -> Path:
    """Return the file that marks the duplicates of a part: one byte per document, 1 for those to drop."""
    return directory / WORK / f"part-{number:05d}.duplicates"


def cleaned_documents(
    job: Job, part: CorpusPart, advance: Advance, reading: ReadReport, cleaner: Cleaner
) -> Iterator[Document]:
    """Yield the documents of a part after cleaning, including duplicates."""
    for document in read_part(part, job.sources, job.reading, reading):
        advance(len(document.text))
        text = cleaner.clean(document.text) if cleaner.active else document.text
        if text is document.text:
            yield document
        elif text is not None and text.strip():
            yield Document(text, document.origin)


def kept_documents(
    job: Job, number: int, part: CorpusPart, advance: Advance, reading: ReadReport, cleaner: Cleaner
) -> Iterator[Document]:
    """Yield the documents of part ``number`` that end up in the dataset."""
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


def survey_part(job: Job, number: int, part: CorpusPart, advance: Advance) -> None:
    """Write the signatures of a part's documents to a file, to find duplicates later."""
    path = signatures_path(job.directory, number)
    if path.is_file():
        advance(part.bytes)
        return
    cleaner = Cleaner(job.cleaning)
    with atomic_file(path) as file:
        for batch in _batches(cleaned_documents(job, part, advance, ReadReport(), cleaner)):
            file.write(signatures([document.text for document in batch], job.cleaning.duplicates, job.cleaning))


def build_part(job: Job, number: int, part: CorpusPart, advance: Advance) -> PartRecord:
    """Make the shards of part ``number``, or resume where an interrupted call stopped."""
    record = PartRecord.open(job.directory, number)
    if record.summary is not None:
        advance(part.bytes)
        return record
    tokenizer, encoder = _load_encoder(job.directory, job.encoder)
    encode = _BatchEncoder(tokenizer, encoder)
    cleaner, reading, digest = Cleaner(job.cleaning), ReadReport(), PartDigest()
    finished = {split: sum(shard.documents for shard in record.shards[split]) for split in SPLITS}
    with _writers(job, number, part.source, record, tokenizer.vocab_size) as writers:
        for batch in _batches(kept_documents(job, number, part, advance, reading, cleaner)):
            hashed = [_HashedDocument.of(document, job.threshold) for document in batch]
            digest.update([each.content for each in hashed], [each.hash for each in hashed])
            new = _without_finished(hashed, finished)
            for each, tokens in zip(new, encode([each.document.text for each in new]), strict=True):
                size, words = len(each.content), count_words(each.content)
                writers[each.split].add(tokens, text_bytes=size, words=words, origin=each.document.origin)
            again = [each.document.text[:RECHECKED_CHARACTERS] for each in new if not each.hash % RECHECKED]
            recheck(encoder, tokenizer, again)
    reports = {"reading": asdict(reading), "cleaning": cleaner.report.to_json()}
    record.finish({"digest": digest.hexdigest()} | reports)
    return record


@dataclass(frozen=True, slots=True)
class _HashedDocument:
    document: Document
    content: bytes  # its text in UTF-8
    hash: int
    split: str

    @classmethod
    def of(cls, document: Document, threshold: int) -> _HashedDocument:
        content = document.text.encode("utf-8")
        document_hash = hash_of(content)
        return cls(document, content, document_hash, "validation" if document_hash < threshold else "train")


def _without_finished(documents: list[_HashedDocument], finished: dict[str, int]) -> list[_HashedDocument]:
    """Return the documents that are not in finished shards; ``finished`` counts those still to skip in each split."""
    new = []
    for each in documents:
        finished[each.split] -= 1
        if finished[each.split] < 0:
            new.append(each)
    return new


@contextmanager
def _writers(
    job: Job, number: int, source: int, record: PartRecord, vocab_size: int
) -> Iterator[dict[str, ShardWriter]]:
    """Open a writer for each split, which adds every finished shard to ``record``."""
    ended = False

    def writer(split: str) -> ShardWriter:
        return ShardWriter(
            job.directory,
            split,
            vocab_size=vocab_size,
            part=number,
            source=source,
            shard_tokens=job.shard_tokens,
            finished=record.shards[split],
            on_finished=lambda shard: record.finish_shard(split, shard, is_last=ended),
        )

    with ExitStack() as stack:
        yield {split: stack.enter_context(writer(split)) for split in SPLITS}
        ended = True


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


# The encoder of this process's current build: loading one costs as much as encoding 20 MB.
_encoders: dict[tuple[Path, str], tuple[Tokenizer, Encoder]] = {}


def keep_encoder(directory: Path, tokenizer: Tokenizer, encoder: Encoder) -> None:
    """Cache an encoder for the parts of a build that this process works on."""
    _encoders.clear()
    _encoders[directory, encoder.short_name] = tokenizer, encoder


def _load_encoder(directory: Path, name: str) -> tuple[Tokenizer, Encoder]:
    if (directory, name) not in _encoders:
        tokenizer = load_tokenizer(directory / TOKENIZER_FILE)
        keep_encoder(directory, tokenizer, make_encoder(name, tokenizer))
    return _encoders[directory, name]


class _BatchEncoder:
    """Encode texts as token arrays in the dtype of shards, each followed by the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder) -> None:
        self._encoder = encoder
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
            return self._encoder.encode(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            raise EncoderError(
                f"the encoder {self._encoder.name} failed ({first_line(error)}): build again with --encoder tokenizers"
            ) from error


def digest_of_parts(summaries: list[dict[str, Any]]) -> str:
    """Return the SHA-256 over the digests of all parts in order, which identifies the text of the whole corpus."""
    return hashlib.sha256("".join(summary["digest"] for summary in summaries).encode("ascii")).hexdigest()


def merged_reports(summaries: list[dict[str, Any]]) -> tuple[ReadReport, CleaningReport]:
    """Merge the reports on reading and cleaning of all parts."""
    reading, cleaning = ReadReport(), CleaningReport()
    for summary in summaries:
        reading.merge(ReadReport(**summary["reading"]))
        cleaning.merge(CleaningReport.from_json(summary["cleaning"]))
    return reading, cleaning
