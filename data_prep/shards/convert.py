"""Convert datasets to and from the layouts of other programs, which ``layouts.py`` defines.

Everything is written to a hidden folder next to the target, which is renamed when it is complete, so the target is
always finished. Only one document at a time is held in memory.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.files import atomic_file, new_folder, write_atomically
from data_prep.progress import Reporter, SilentReporter
from data_prep.settings import DEFAULT_SHARD_TOKENS, LARGEST_SHARD_TOKENS
from data_prep.shards import layouts
from data_prep.shards.layouts import TokenFile
from data_prep.shards.manifest import make_manifest, save_manifest
from data_prep.shards.tokens import ENDS_INSIDE, SPLITS, TOKENIZER_FILE, Dataset, ShardWriter, Split, count_words
from data_prep.tokenizers.tokenizer import Tokenizer, token_dtype

PIECE_TOKENS = 1 << 20  # of a long document, decoded at a time
SHORT_SPLIT_NAMES = {"train": "train", "validation": "val"}  # in nanoGPT and llm.c
VALIDATION_WORD = re.compile(r"(?<![a-z])val(id(ation)?)?(?![a-z])", re.IGNORECASE)
NANOGPT_VOCAB_SIZE = 50304  # what nanoGPT assumes without meta.pkl
# What an import may change in the tokens, by the name of its count in the manifest.
CHANGES = {
    "empty_documents": "empty documents that were dropped",
    "ends_added": "documents without an end-of-text token, which was added",
    "ends_moved": "splits in which the end-of-text token came before each document, and now follows it",
}
CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


def export_dataset(
    dataset: Dataset, layout: str, out: Path, *, copy: bool = False, progress: Reporter | None = None
) -> list[str]:
    """Export a dataset for nanogpt, llmc, datatrove or olmo to the new folder ``out``, and return the file names.

    Unless ``copy`` is set, token files are hard links to the dataset where the bytes are the same and the disk allows
    it. Splits without tokens have no files. Raises ``UserError`` if the layout cannot represent the dataset.
    """
    progress = progress or SilentReporter()
    if layout == "nanogpt" and dataset.vocab_size > 2**16:
        raise UserError(
            f"nanoGPT reads 16-bit tokens, but the vocabulary has {dataset.vocab_size:,} tokens: choose another --to"
        )
    with new_folder(out) as folder:
        for name in SPLITS:
            split = dataset.split(name)
            if split.documents == 0:
                progress.note(f"the {name} split is empty, so it has no file")
            elif layout == "nanogpt":
                _export_nanogpt(dataset, split, folder, copy)
            elif layout == "llmc":
                _export_llmc(dataset, split, folder, out.resolve().name)
            elif layout == "datatrove":
                _export_datatrove(dataset, split, folder, copy)
            else:
                _export_olmo(dataset, split, folder, copy)
        if layout == "nanogpt" and dataset.vocab_size > NANOGPT_VOCAB_SIZE:
            # nanoGPT has no other way to know a vocabulary above its default.
            write_atomically(folder / "meta.pkl", layouts.nanogpt_meta(dataset.vocab_size))
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def _export_nanogpt(dataset: Dataset, split: Split, folder: Path, copy: bool) -> None:
    sources = [dataset.directory / f"{record.name}.bin" for record in split.records]
    _link_or_copy(sources, folder / f"{SHORT_SPLIT_NAMES[split.name]}.bin", copy)


def _export_llmc(dataset: Dataset, split: Split, folder: Path, name: str) -> None:
    dtype = token_dtype(dataset.vocab_size)
    most = (layouts.LLMC_LARGEST_FILE - layouts.LLMC_HEADER_BYTES) // dtype.itemsize
    number = 0 if split.name == "validation" else 1  # llm.c's scripts number validation 0 and train from 1
    for record in split.records:
        tokens = np.memmap(dataset.directory / f"{record.name}.bin", dtype=dtype, mode="r")
        for start in range(0, record.tokens, most):
            part = tokens[start : start + most]
            with atomic_file(folder / f"{name}_{SHORT_SPLIT_NAMES[split.name]}_{number:06d}.bin") as file:
                file.write(layouts.llmc_header(part.size, dtype))
                file.write(part.data)
            number += 1


def _export_datatrove(dataset: Dataset, split: Split, folder: Path, copy: bool) -> None:
    dtype = token_dtype(dataset.vocab_size)
    (folder / split.name).mkdir()
    for record in split.records:
        path = folder / split.name / f"{record.name}.ds"
        _link_or_copy([dataset.directory / f"{record.name}.bin"], path, copy)
        write_atomically(Path(f"{path}.index"), layouts.datatrove_index(split.shard_lengths(record)))
        write_atomically(Path(f"{path}.metadata"), layouts.datatrove_metadata(TOKENIZER_FILE, record.tokens, dtype))


def _export_olmo(dataset: Dataset, split: Split, folder: Path, copy: bool) -> None:
    (folder / split.name).mkdir()
    documents = 0
    for number, record in enumerate(split.records):
        path = folder / split.name / f"part-0-{number:05d}.npy"
        _link_or_copy([dataset.directory / f"{record.name}.bin"], path, copy)
        index = layouts.olmo_index(split.shard_lengths(record), record.name, documents)
        write_atomically(path.with_suffix(".csv.gz"), index)
        documents += record.documents


def _link_or_copy(sources: Sequence[Path], target: Path, copy: bool) -> None:
    """Make ``target`` the concatenation of ``sources``: a hard link for a single file if possible, else a copy."""
    if len(sources) == 1 and not copy:
        try:
            target.hardlink_to(sources[0].resolve())
            return
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
    with atomic_file(target) as file:
        for path in sources:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)


def import_dataset(
    sources: Sequence[Path],
    layout: str,
    tokenizer: Tokenizer,
    out: Path,
    *,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """Import files, or folders of files, of a layout in ``layouts.SUFFIXES`` as the dataset ``out``.

    A file becomes validation if its name or a subfolder's name contains the word val, valid or validation; all others
    become train. Files are read in the order of their names. Returns the manifest, whose ``left_out`` counts what was
    changed. Raises ``UserError`` for a damaged file, or a token outside the vocabulary of ``tokenizer``.
    """
    progress = progress or SilentReporter()
    if not 1 <= shard_tokens <= LARGEST_SHARD_TOKENS:
        raise UserError(f"--shard-tokens must be from 1 to {LARGEST_SHARD_TOKENS:,}")
    paths = _find_files(sources, layout)
    files = {split: _checked_files(paths[split], layout, tokenizer) for split in SPLITS}
    if sum(file.tokens.size for file in files["train"]) == 0:
        raise UserError("the files contain no tokens to train on: add files without val or validation in their names")
    changes = {"empty_documents": 0, "ends_added": 0, "ends_moved": 0}
    ends_inside = 0
    with new_folder(out) as folder:
        records = {}
        for split in SPLITS:
            writer = ShardWriter(folder, split, vocab_size=tokenizer.vocab_size, shard_tokens=shard_tokens)
            ends_inside += _write_shards(writer, f"reading {split}", files[split], tokenizer, changes, progress)
            records[split] = writer.records
        tokenizer.save(folder / TOKENIZER_FILE)
        all_paths = paths["train"] + paths["validation"]
        manifest = make_manifest(
            tokenizer,
            records,
            split_rule={"validation_if": "the name of the file or its folder has the word val, valid or validation"},
            sources=[
                {
                    "name": sources[0].resolve().name,
                    "weight": 1.0,
                    "files": len(all_paths),
                    "bytes": sum(path.stat().st_size for path in all_paths),
                }
            ],
            settings={"converted_from": layout, "shard_tokens": shard_tokens, ENDS_INSIDE: ends_inside},
            left_out=changes,
            cleaning={},
            corpus_sha256=None,
            encoders={},
        )
        save_manifest(folder, manifest)
    for name, sentence in CHANGES.items():
        if changes[name]:
            progress.note(f"{sentence}: {changes[name]:,}")
    if ends_inside:
        progress.note(f"end-of-text tokens inside documents, where training starts a new text: {ends_inside:,}")
    return manifest


def _checked_files(paths: Sequence[Path], layout: str, tokenizer: Tokenizer) -> list[TokenFile]:
    files = [layouts.read_token_file(path, layout, tokenizer.vocab_size) for path in paths]
    for file in files:
        layouts.check_ids(file, tokenizer.vocab_size)
    return files


def _write_shards(
    writer: ShardWriter,
    stage: str,
    files: Sequence[TokenFile],
    tokenizer: Tokenizer,
    changes: dict[str, int],
    progress: Reporter,
) -> int:
    """Write all documents, and return how many end-of-text tokens are inside them."""
    inside = 0
    with progress.stage(stage, sum(file.tokens.nbytes for file in files)) as advance, writer:
        for document in _ended_documents(files, tokenizer.end_of_text_id, changes):
            size, words = text_size(tokenizer, document)
            writer.add(document, text_bytes=size, words=words)
            inside += int(np.count_nonzero(document == tokenizer.end_of_text_id)) - 1
            advance(document.nbytes)
    return inside


def _find_files(sources: Sequence[Path], layout: str) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    suffix = layouts.SUFFIXES[layout]
    for source in sources:
        if source.is_dir():
            paths = sorted(path for path in source.rglob(f"*{suffix}") if path.is_file())
            if not paths:
                raise UserError(f'"{source}" contains no {layout} files (*{suffix})')
            names = [path.relative_to(source).as_posix() for path in paths]
        elif source.is_file():
            paths, names = [source], [source.name]
        else:
            raise UserError(f'"{source}" does not exist')
        for path, name in zip(paths, names, strict=True):
            found["validation" if VALIDATION_WORD.search(name) else "train"].append(path)
    return found


def _ended_documents(files: Sequence[TokenFile], end_of_text_id: int, changes: dict[str, int]) -> Iterator[np.ndarray]:
    """Yield the documents, each ending with one end-of-text token; ``changes`` counts the necessary changes."""
    documents = layouts.documents_of(files, end_of_text_id)
    filled = [file for file in files if file.tokens.size]
    begin_with_it = (
        bool(filled)
        and all(file.lengths is None for file in filled)
        and filled[0].tokens[0] == end_of_text_id
        and filled[-1].tokens[-1] != end_of_text_id
    )
    if begin_with_it:  # llm.c's scripts write the token before each document, not after it
        next(documents)
    for document in documents:
        if document.size == 0:
            changes["empty_documents"] += 1
        elif document[-1] == end_of_text_id:
            yield document
        else:
            changes["ends_moved" if begin_with_it else "ends_added"] += 1
            yield np.append(document, np.array([end_of_text_id], document.dtype))


def text_size(tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[int, int]:
    """Return the UTF-8 bytes and words of the text of some tokens, without special tokens."""
    size = words = 0
    in_word = False
    for start in range(0, tokens.size, PIECE_TOKENS):
        content = tokenizer.decode_bytes(tokens[start : start + PIECE_TOKENS].tolist())
        if content:
            size += len(content)
            words += count_words(content) - (in_word and content[0] > 32)
            in_word = content[-1] > 32
    return size, words
