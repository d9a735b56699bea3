"""The loader: batches per second compared with nanoGPT, the batches of training, packing, and opening many shards.

    python -m benchmarks.loader [--rounds 7]

nanoGPT's approach, reimplemented: open the memory map for each batch, draw random positions, copy a window from each as
int64, stack inputs and targets. Ours visits every window once per epoch in a keyed order. Candidates take turns, each
making ``BATCHES`` batches of 12 x 1024; text lengths come from a log-normal distribution.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch

import data_prep
from benchmarks.side_by_side import in_turn
from data_prep.shards.folder import LocalFolder
from data_prep.shards.manifest import split_totals
from data_prep.shards.tokens import (
    MANIFEST,
    Dataset,
    ShardRecord,
    ShardWriter,
    Split,
    index_bytes,
    open_dataset,
)
from lm.config.objective_settings import OBJECTIVES
from lm.config.settings import Config
from lm.data.corpora import Corpora
from lm.data.packing import plan_rows
from lm.objectives.batches import TrainingBatches

ROWS, CONTEXT, BATCHES = 12, 1024, 100
TOKENS, DOCUMENT_MEDIAN, SHARD_TOKENS = 24_000_000, 500, 2**22
SHARDS = 10_000
MILLION = 1_000_000


def document_lengths(documents: int) -> np.ndarray:
    draws = np.random.default_rng(0).lognormal(np.log(DOCUMENT_MEDIAN), 1, documents)
    return draws.astype(np.int64) + 2


def dataset_in(folder: Path, write: Callable[[Path], Sequence[ShardRecord]]) -> Dataset:
    """Make a dataset whose training shards ``write`` produces, with the tokenizer ``bytes``."""
    source = folder / "text.txt"
    source.write_text("a text\n" * 100, encoding="utf-8")
    data_prep.build([source], folder / "data", tokenizer_kind="bytes", validation_fraction=0.0)
    for shard in (folder / "data").glob("train-*"):
        shard.unlink()
    path = folder / "data" / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["splits"]["train"] = split_totals(write(folder / "data"))
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return open_dataset(folder / "data")


def large_shards(directory: Path) -> Sequence[ShardRecord]:
    """Write random tokens to a few shards."""
    draws = np.random.default_rng(1)
    with ShardWriter(directory, "train", vocab_size=256, shard_tokens=SHARD_TOKENS) as writer:
        written = 0
        for length in document_lengths(TOKENS).tolist():
            tokens = draws.integers(10, 256, length, dtype=np.uint16)
            tokens[-1] = 0
            writer.add(tokens, text_bytes=length, words=1)
            written += length
            if written >= TOKENS:
                break
    return writer.records


def many_shards(directory: Path) -> Sequence[ShardRecord]:
    """Write 10,000 shards of ten documents with 100 tokens each."""
    lengths = np.full(10, 100)
    tokens = np.full(1000, 65, dtype="<u2")
    tokens[99::100] = 0
    content, index = tokens.tobytes(), index_bytes(lengths, tokens.dtype)
    records = []
    for number in range(SHARDS):
        name = f"train-{number:05d}"
        (directory / f"{name}.bin").write_bytes(content)
        (directory / f"{name}.idx").write_bytes(index)
        records.append(ShardRecord(name, 0, 1000, 10, 1000, 10, "", "", "", ""))
    return records


def nanogpt(path: Path) -> Callable[[], object]:
    def batches() -> None:
        for _ in range(BATCHES):
            data = np.memmap(path, dtype=np.uint16, mode="r")
            positions = torch.randint(len(data) - CONTEXT, (ROWS,)).tolist()
            torch.stack([torch.from_numpy(data[p : p + CONTEXT].astype(np.int64)) for p in positions])
            torch.stack([torch.from_numpy(data[p + 1 : p + 1 + CONTEXT].astype(np.int64)) for p in positions])

    return batches


def called(make: Callable[[int], object]) -> Callable[[], object]:
    """Return a function that calls ``make`` ``BATCHES`` times with consecutive numbers."""
    numbers = count()

    def batches() -> None:
        for _ in range(BATCHES):
            make(next(numbers))

    return batches


def compare(folder: Path, rounds: int) -> None:
    dataset = dataset_in(folder, large_shards)
    whole = folder / "train.bin"
    with whole.open("wb") as file:
        for shard in sorted((folder / "data").glob("train-*.bin")):
            with shard.open("rb") as content:
                shutil.copyfileobj(content, file)
    config = Config().replace(context_length=CONTEXT, batch_tokens=ROWS * CONTEXT, steps=1)
    candidates = {"nanoGPT, map opened for each batch": nanogpt(whole)}
    for packing in ("windows", "documents"):
        batches = TrainingBatches(Corpora([dataset]), config.replace(packing=packing))
        for sentence in batches.rows.introduction(1):
            print(sentence)
        candidates[f"{packing}, inputs and targets"] = called(batches.rows.of_step)
        for objective in OBJECTIVES:
            batches = TrainingBatches(Corpora([dataset]), config.replace(packing=packing, objective=objective))
            candidates[f"{packing}, {objective} for training"] = called(batches.batch)
    timings = in_turn(candidates, rounds=rounds)
    print(f"\nbatches of {ROWS} x {CONTEXT} per second{'':19}wall clock     CPU  times nanoGPT (CPU)")
    first = next(iter(timings.values()))
    for name, timing in timings.items():
        rates = f"{BATCHES / timing.wall:12,.0f}  {BATCHES / timing.cpu:6,.0f}  {first.cpu / timing.cpu:.2f}"
        print(f"  {name:46}{rates}")


class Lengths(Split):
    """A split that only has document lengths."""

    def __init__(self, lengths: np.ndarray) -> None:
        record = ShardRecord("train-00000", 0, int(lengths.sum()), len(lengths), 0, 0, "", "", "", "")
        super().__init__(
            LocalFolder(Path()), "train", np.dtype("<u2"), split_totals([record]), [{"name": "", "weight": 1.0}]
        )
        self._lengths = lengths

    def shard_lengths(self, record: ShardRecord) -> np.ndarray:
        return self._lengths


def pack() -> None:
    lengths = document_lengths(MILLION)
    split = Lengths(lengths)
    print("\npacking a million documents")
    for context_length in (256, 1024, 4096):
        began = time.process_time()
        plan = plan_rows(split, 0, split.tokens, context_length)
        seconds = time.process_time() - began
        print(
            f"  rows of {context_length:4}: {seconds:.2f} CPU s, {len(plan.starts) / seconds / 1e6:.1f}M fragments/s, "
            f"{split.tokens / plan.rows / context_length:.3%} full, {plan.nbytes / MILLION:.1f} bytes per document"
        )


def opening(folder: Path) -> None:
    dataset = dataset_in(folder, many_shards)
    walls = []
    for _ in range(3):
        began = time.perf_counter()
        dataset = open_dataset(folder / "data")
        walls.append(time.perf_counter() - began)
    config = Config().replace(context_length=CONTEXT, batch_tokens=ROWS * CONTEXT)
    began = time.perf_counter()
    TrainingBatches(Corpora([dataset]), config).batch(0)
    print(f"\nopening {SHARDS:,} shards: {min(walls):.2f} s; first batch {time.perf_counter() - began:.3f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for part in ("large", "many"):
            (Path(scratch) / part).mkdir()
        compare(Path(scratch) / "large", arguments.rounds)
        pack()
        opening(Path(scratch) / "many")
