"""From text to verified shards: the whole command ``data_prep build``, compared with common alternatives.

    pip install datatrove orjson tiktoken
    python -m benchmarks.data_prep TEXT_FOLDER [--megabytes 200] [--peer-megabytes 20] [--rounds 3]

The text is that of the folder, repeated with changed words until it is long enough, in documents of about 3,700 bytes
(.jsonl) and as plain text (.txt). A byte-level BPE of 32,768 tokens is trained on it once, outside the timing, and used
by all candidates. Each candidate is a separate process, timed as a whole including imports, in the order A B A B:

- kindling: ``python -m data_prep build …`` with one and with two workers, followed by ``data_prep verify``;
- datatrove: its reader and tokenizer stages, two local tasks;
- nanoGPT's approach: ``datasets.map`` over two processes with tiktoken, then a memory-mapped file of uint16.

The peers are slower, so they get a shorter text; rates are compared. CPU seconds include all processes; memory is their
combined peak (proportional set size, sampled every 200 ms).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    text, tokenizer, out = sys.argv[1:]
    end = "<|endoftext|>"
    tokens = DocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token=end, shuffle_documents=False)
    steps = [JsonlReader(text, glob_pattern="*.jsonl"), tokens]
    LocalPipelineExecutor(steps, tasks=2, workers=2, logging_dir=out + "/logs").run()
"""

NANOGPT = """
import json, sys
import datasets, numpy as np, tiktoken
text, ranks, out = sys.argv[1:]
described = json.load(open(ranks))
encoding = tiktoken.Encoding(
    "given",
    pat_str=described["pattern"],
    mergeable_ranks={bytes.fromhex(token): rank for token, rank in described["ranks"]},
    special_tokens={},
)

def encode(row):
    ids = encoding.encode_ordinary(row["text"]) + [0]
    return {"ids": ids, "length": len(ids)}

if __name__ == "__main__":
    rows = datasets.load_dataset("json", data_files=text + "/*.jsonl", split="train", cache_dir=out + "/cache")
    rows = rows.map(encode, remove_columns=["text"], num_proc=2)
    tokens = np.memmap(out + "/train.bin", dtype=np.uint16, mode="w+", shape=(int(sum(rows["length"])),))
    at = 0
    for number in range(64):
        ids = np.concatenate(rows.shard(64, number, contiguous=True).with_format("numpy")["ids"])
        tokens[at : at + len(ids)] = ids
        at += len(ids)
    tokens.flush()
"""
PR_SET_CHILD_SUBREAPER = 36
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu_seconds: float
    peak_megabytes: float


def changed_text(folder: Path, size: int) -> Iterator[str]:
    """Yield the text of the folder repeatedly, up to ``size`` bytes, with different words in every round."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    draw, written = random.Random(0), 0
    while True:
        for text in texts:
            # One word in twelve gets a different ending, so that no round repeats the same words.
            ending = "".join(draw.choices("aeioulnrst", k=3))
            changed = re.sub(
                r"\b(\w+)(?= \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w)",
                rf"\1{ending}",
                text,
                count=len(text) // 70,
            )
            for start in range(0, len(changed), 3700):
                piece = changed[start : start + 3700]
                written += len(piece.encode())
                yield piece
                if written >= size:
                    return


def adopt_orphans() -> None:
    """Become the parent of orphaned processes, so that their CPU seconds are counted here."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def wait_for_orphans(group: int = 1) -> None:
    """Wait for all children in a process group; 1: in any."""
    while True:
        try:
            os.waitpid(-group, 0)
        except ChildProcessError:
            return


def measured(command: list[str]) -> Cost:
    """Run a command and measure it with all the processes it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of_group(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    assert process.stderr is not None
    stderr = process.stderr.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{stderr[-2000:]}")
    wait_for_orphans(process.pid)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu, peak / 1e6)


def memory_of_group(group: int) -> int:
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                found = re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) * 1024 if found else 0
        except (OSError, ValueError):
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--peer-megabytes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peers", action="store_true")
    arguments = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        compare(arguments, Path(name))


def compare(arguments: argparse.Namespace, work: Path) -> None:
    sizes = {"large": arguments.megabytes * 10**6, "small": arguments.peer_megabytes * 10**6}
    for size, limit in sizes.items():
        for kind in ("txt", "jsonl"):
            (work / f"{size}-{kind}").mkdir()
        with (work / f"{size}-txt/a.txt").open("w") as plain, (work / f"{size}-jsonl/a.jsonl").open("w") as records:
            for piece in changed_text(arguments.folder, limit):
                plain.write(piece)
                records.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
    python = sys.executable
    trained = work / "trained"
    first = [
        python,
        "-m",
        "data_prep",
        "build",
        str(work / "large-txt"),
        "--out",
        str(trained),
        "--vocab-size",
        "32768",
    ]
    subprocess.run([*first, "--workers", "2"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_orphans()  # their CPU seconds must not count for the first candidate
    tokenizer = trained / "tokenizer.json"
    write_ranks(tokenizer, work / "ranks.json")
    (work / "with_datatrove.py").write_text(DATATROVE)
    (work / "as_nanogpt.py").write_text(NANOGPT)

    def build(text: str, workers: int) -> list[str]:
        out = work / "out"
        command = f'"{python}" -m data_prep build {work / text} --out {out} --tokenizer {tokenizer} --workers {workers}'
        return ["bash", "-c", f'{command} && "{python}" -m data_prep verify {out}']

    candidates = {
        f"kindling, .{kind}, {workers} worker{'s' * (workers > 1)}": (build(f"large-{kind}", workers), sizes["large"])
        for kind in ("txt", "jsonl")
        for workers in (1, 2)
    }
    if not arguments.without_peers:
        small = str(work / "small-jsonl")
        candidates |= {
            "datatrove, .jsonl": (
                [python, str(work / "with_datatrove.py"), small, str(tokenizer), str(work / "out")],
                sizes["small"],
            ),
            "nanoGPT's approach, .jsonl": (
                [python, str(work / "as_nanogpt.py"), small, str(work / "ranks.json"), str(work / "out")],
                sizes["small"],
            ),
        }
    costs: dict[str, list[Cost]] = {name: [] for name in candidates}
    for _ in range(arguments.rounds):
        for name, (command, _) in candidates.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            if "kindling" not in name:
                (work / "out").mkdir()
            costs[name].append(measured(command))
    print(f"{'':24}  MB/s wall  MB per CPU s  peak MB")
    for name, (_, size) in candidates.items():
        wall = size / 1e6 / statistics.median(cost.seconds for cost in costs[name])
        cpu = size / 1e6 / statistics.median(cost.cpu_seconds for cost in costs[name])
        peak = max(cost.peak_megabytes for cost in costs[name])
        print(f"{name:24}  {wall:9.2f}  {cpu:12.2f}  {peak:7.0f}")


def write_ranks(tokenizer: Path, path: Path) -> None:
    """Write the tokenizer's merges in the form that tiktoken needs."""
    from data_prep.tokenizers.tokenizer import BYTE_OF_CHARACTER

    described = json.loads(tokenizer.read_text(encoding="utf-8"))
    special = {token["content"] for token in described["added_tokens"]}
    ranks = [
        (bytes(BYTE_OF_CHARACTER[character] for character in token).hex(), number)
        for token, number in described["model"]["vocab"].items()
        if token not in special
    ]
    path.write_text(json.dumps({"pattern": GPT2_PATTERN, "ranks": ranks}))


if __name__ == "__main__":
    main()
