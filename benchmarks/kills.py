"""Does a run that is killed again and again end with the bits of a run that was left alone?

python -m benchmarks.kills RECIPE [--kills 10] [--seed 0] [OPTION OF train.py ...]

Both runs save every third step. One is killed by SIGKILL shortly after it has logged a step, at random steps and after
a random part of a second, and started again. Then all files of the last checkpoint, byte by byte, and the log are
compared; of the log, only what describes the machine may differ. Exit status 1 if anything else does.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_prep.files import sha256_of_file

OF_THE_MACHINE = {"tokens_per_second", "images_per_second", "memory_bytes", "share_of_peak"}


def start(recipe: str, run: Path, options: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", recipe, "--run", str(run)]
    every_step = ["--checkpoint-every", "3", "--log-every", "1"]
    output = run.with_suffix(".log").open("a", encoding="utf-8")
    return subprocess.Popen([*command, *every_step, *options], stdout=output, stderr=output, text=True)


def logged(run: Path) -> list[dict[str, object]]:
    """The lines of the log so far, without the last one if it is not whole."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]


def last_step(run: Path) -> int:
    return max((int(str(line.get("step", 0))) for line in logged(run)), default=0)


def left_alone(recipe: str, run: Path, options: list[str]) -> None:
    if status := start(recipe, run, options).wait():
        sys.exit(f"train.py ended with status {status}: {run.with_suffix('.log').read_text(encoding='utf-8')[-500:]}")


def killed(recipe: str, run: Path, options: list[str], steps: list[int], draw: random.Random) -> int:
    """Kill the run after each of ``steps``, then let it end; return how many kills found it alive."""
    kills = 0
    for step in steps:
        process = start(recipe, run, options)
        while last_step(run) < step and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.wait()
    left_alone(recipe, run, options)
    return kills


def checkpoint_sums(run: Path) -> dict[str, str]:
    """The checksum of each file in the last checkpoint."""
    folder = max((run / "checkpoints").iterdir())
    return {f"{folder.name}/{file.name}": sha256_of_file(file) for file in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments, options = parser.parse_known_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        alone, again = Path(name, "alone"), Path(name, "killed")
        left_alone(arguments.recipe, alone, options)
        moments = sorted(draw.sample(range(1, last_step(alone)), arguments.kills))
        kills = killed(arguments.recipe, again, options, moments, draw)
        sums, others = checkpoint_sums(alone), checkpoint_sums(again)
        differ = sorted(file for file in sums.keys() | others.keys() if sums.get(file) != others.get(file))
        same_log = [line for line in logged(alone) if "loss" in line] == [
            line for line in logged(again) if "loss" in line
        ]
        print(f"killed {kills} times, after steps {', '.join(map(str, moments))} of {last_step(alone)}")
        print(f"files of the last checkpoint that differ: {', '.join(differ) or f'none of {len(sums)}'}")
        print(f"losses in the log: {'the same' if same_log else 'not the same'}")
        sys.exit(bool(differ) or not same_log or kills < arguments.kills)


if __name__ == "__main__":
    main()
