"""Compare the estimates of ``train.py --plan`` with measurements: peak memory and speed of three recipes.

    python -m benchmarks.plan [--data FOLDER] [--steps 20] [--threads N]

Each recipe is planned in one process and trained in another, one after the other. The batches are smaller than the
recipes' own, so that everything takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import data_prep

# The recipes, and their batches here.
BATCHES = {
    "tiny": {"batch_tokens": 4096},
    "small": {"batch_tokens": 1024},
    "30m": {"batch_tokens": 512, "context_length": 256},
}


def train_py(*arguments: object) -> str:
    """Run ``kindling train`` in a new process and return its output."""
    command = [sys.executable, "-c", "from lm.cli.main import main; main()", "train", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(preset: str, data: Path, steps: int, threads: int, scratch: Path) -> dict[str, Any]:
    """Estimated and measured peak memory, in bytes, and tokens per second, of ``steps`` steps of a recipe."""
    settings = {"data": data, "steps": steps, "threads": threads, "log_every": 1, **BATCHES[preset]}
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", value)]
    plan = json.loads(train_py(preset, *options, "--plan", "--json"))
    train_py(preset, *options, "--run", scratch / preset)
    lines = [json.loads(line) for line in (scratch / preset / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    return {
        "preset": preset,
        "rows": plan["micro_batch_rows"],
        "memory": (plan["memory_bytes"]["peak"], trained[-1]["memory_bytes"]),
        "speed": (
            plan["tokens_per_second"],
            1 / statistics.mean(1 / line["tokens_per_second"] for line in trained),
        ),
        "share_of_peak": statistics.median(line["share_of_peak"] for line in trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of token shards; default: the built-in corpus")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--presets", nargs="*", choices=list(BATCHES), default=list(BATCHES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or Path(scratch) / "data"
        if arguments.data is None:
            data_prep.build(["builtin"], data, vocab_size=8192, validation_fraction=0.02)
        print("preset  rows  peak MB: planned  real  ratio   tokens/s: planned  real  ratio   share of peak")
        for preset in arguments.presets:
            found = compare(preset, data, arguments.steps, arguments.threads, Path(scratch))
            (memory, real_memory), (speed, real_speed) = found["memory"], found["speed"]
            print(
                f"{preset:6}  {found['rows']:4}  {memory / 1e6:16,.0f}  {real_memory / 1e6:,.0f}  "
                f"{real_memory / memory:5.2f}  {speed:18,.0f}  {real_speed:,.0f}  {real_speed / speed:5.2f}  "
                f"{found['share_of_peak']:13.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
