"""CPU seconds until a command's first result, or until it says what is wrong: python -m benchmarks.startup

Each command runs in a process of its own, with one thread; the least of several runs is printed. To compare with
another checkout, run this file there.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 3
PROGRAM = "from lm.cli.main import main; main(prog_name='kindling')"
SHAPE = "--num-layers 2 --hidden-size 32 --num-heads 2 --context-length 32 --batch-tokens 256 --steps 1"
MADE = (
    "prep build text --out data --vocab-size 400 --validation-fraction 0.1",
    f"train tiny --data data --run run {SHAPE}",
)
# Each command, and the folder that it writes.
MEASURED = {
    "sample none --prompt The": "",
    "sample run --fill The": "",
    "sample run --input none.jsonl": "",
    "sample run --prompt The --max-new-tokens 1": "",
    "evaluate run --text none.txt": "",
    "evaluate run": "",
    f"train tiny --data data --run new {SHAPE}": "new",
    f"train tiny --data data --plan {SHAPE}": "",
    "prep build text --out built --vocab-size 400": "built",
}


def cpu_seconds(arguments: str, *, check: bool = False) -> float:
    """User and system time of a command and of the processes that it started; with ``check`` it must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments.split()],
        stdout=subprocess.DEVNULL,
        stderr=None if check else subprocess.DEVNULL,
        check=check,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    os.environ["PYTHONPATH"] = str(Path.cwd())
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("text").mkdir()
        draw = random.Random(0)
        words = ["".join(draw.choices("aeinorst", k=draw.randint(2, 8))) for _ in range(500)]
        for number in range(300):
            Path(f"text/{number}.txt").write_text(" ".join(["The", *draw.choices(words, k=60)]))
        for command in MADE:
            cpu_seconds(command, check=True)
        for command, written in MEASURED.items():
            seconds = []
            for _ in range(ROUNDS):
                seconds.append(cpu_seconds(command))
                shutil.rmtree(written or "nothing", ignore_errors=True)
            print(f"{min(seconds):6.2f} s  kindling {command.replace(' ' + SHAPE, ' …')}", flush=True)


if __name__ == "__main__":
    main()
