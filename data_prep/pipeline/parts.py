"""Process one part of the input. The result depends only on the part and the job.

Parts can therefore be processed in any order, by any process on any machine that can access the files::

    read → clean → drop duplicates → split → encode → shards, and a record of what was done
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cleaning.cleaner import Cleaner, CleaningReport
from data_prep.cleaning.duplicates import signatures
from data_prep.files import atomic_file
from data_prep.pipeline.journal import PartRecord, part_path
from data_prep.pipeline.splitting import PartDigest, hash_of
from data_prep.pipeline.workers import Advance
from data_prep.settings import KEEP, BuildSettings
from data_prep.shards.tokens import SPLITS, TOKENIZER_FILE, ShardWriter, count_words
from data_prep.sources.documents import CorpusPart, Document, ReadReport, Source
from data_prep.sources.reading import read_part
from data_prep.sources.records import first_line
from data_prep.tokenizers.encoders import Encoder, EncoderError, make_encoder, recheck
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.loss import loss_of
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype

BATCH_BYTES = 1 << 20  # of text encoded at a time
# The slow encoder also encodes the first characters of one document in a thousand, chosen by hash.
RECHECKED, RECHECKED_CHARACTERS = 1000, 10_000


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to process any part of a build."""

    settings: BuildSettings
    sources: tuple[Source, ...]
    threshold: int = 0
    encoder: str = ""


def cleaned_documents(
    job: Job, part: CorpusPart, advance: Advance, reading: ReadReport, cleaner: Cleaner
) -> Iterator[Document]:
    """Yield the documents of a part after cleaning, including duplicates."""
    done = reading.text_bytes
    for document in read_part(part, job.sources, job.settings.reading, reading):
        advance(reading.text_bytes - done)
        done = reading.text_bytes
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
    how = job.settings.cleaning.duplicates
    if how == KEEP:
        yield from documents
        return
    left_out = np.fromfile(part_path(job.settings.out, number, "duplicates"), np.uint8)
    for document, duplicate in zip(documents, left_out, strict=True):
        if duplicate:
            cleaner.report.step(f"{how} duplicates").remove(document.text, f"was there before ({how})")
        else:
            yield document


def survey_part(job: Job, number: int, part: CorpusPart, advance: Advance) -> None:
    """Write the signatures of a part's documents to a file, to find duplicates later."""
    path, settings = part_path(job.settings.out, number, "signatures"), job.settings.cleaning
    if path.is_file():
        advance(part.bytes)
        return
    with atomic_file(path) as file:
        for batch in _batches(cleaned_documents(job, part, advance, ReadReport(), Cleaner(settings))):
            file.write(signatures([document.text for document in batch], settings.duplicates))


def build_part(job: Job, number: int, part: CorpusPart, advance: Advance) -> PartRecord:
    """Make the shards of part ``number``, or resume where an interrupted call stopped."""
    record = PartRecord.open(job.settings.out, number)
    if record.summary is not None:
        advance(part.bytes)
        return record
    tokenizer, encoder = _load_encoder(job.settings.out, job.encoder)
    cleaner, reading, digest = Cleaner(job.settings.cleaning), ReadReport(), PartDigest()
    finished = {split: sum(shard.documents for shard in record.shards[split]) for split in SPLITS}
    writer = partial(
        ShardWriter,
        job.settings.out,
        vocab_size=tokenizer.vocab_size,
        part=number,
        source=part.source,
        shard_tokens=job.settings.shard_tokens,
    )
    with record.writers(writer) as writers:
        for batch in _batches(kept_documents(job, number, part, advance, reading, cleaner)):
            hashed = [_HashedDocument.of(document, job.threshold) for document in batch]
            digest.update([each.content for each in hashed], [each.hash for each in hashed])
            new = _without_finished(hashed, finished)
            encoded = encode_batch([each.document.text for each in new], tokenizer, encoder)
            for each, tokens in zip(new, encoded, strict=True):
                size, words = len(each.content), count_words(each.content)
                loss = loss_of(tokenizer, each.document.text, tokens[:-1])
                writers[each.split].add(tokens, text_bytes=size, words=words, origin=each.document.origin, loss=loss)
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


def encode_batch(texts: list[str], tokenizer: Tokenizer, encoder: Encoder) -> Iterator[np.ndarray]:
    """Yield the tokens of each text in the dtype of shards, followed by the end-of-text token."""
    try:
        ids, lengths = encoder.encode(texts)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise EncoderError(
            f"the encoder {encoder.name} failed ({first_line(error)}): build again with --encoder tokenizers"
        ) from error
    dtype = token_dtype(tokenizer.vocab_size)
    end_of_text = np.array([tokenizer.end_of_text_id], dtype).tobytes()
    content, start = memoryview(ids.tobytes()), 0
    for length in lengths.tolist():
        stop = start + length * dtype.itemsize
        yield np.frombuffer(b"".join((content[start:stop], end_of_text)), dtype)
        start = stop


def merged(summaries: list[dict[str, Any]]) -> tuple[ReadReport, CleaningReport, str]:
    """Merge the reports on reading and cleaning of all parts, in order.

    The third result is the SHA-256 over their digests, which identifies the text of the whole corpus.
    """
    reading, cleaning, digest = ReadReport(), CleaningReport(), hashlib.sha256()
    for summary in summaries:
        reading.merge(ReadReport(**summary["reading"]))
        cleaning.merge(CleaningReport.from_json(summary["cleaning"]))
        digest.update(summary["digest"].encode("ascii"))
    return reading, cleaning, digest.hexdigest()
