"""A process that trains as train.py does, for the tests that kill or stop one."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lm.config.settings import Config

ROOT = Path(__file__).parents[3]

# Imports take seconds, a fork milliseconds: this process imports everything once, and each child it forks then does all
# that train.py does. It reads one line per child: recipe, run, file for stderr, largest file in bytes (0: no limit),
# and the file operation of its third save before which it kills itself (0: none). A save takes a few milliseconds, so
# a signal from outside would usually miss it.
SERVER = """
import os, resource, signal, sys
from pathlib import Path
import lm.cli.main, lm.evaluation.validation_loss, lm.training.terminal, lm.reports.run_report, lm.training.trainer
from lm.reports import page

page.draw = lambda panels, height, *, stacked=False: "<svg></svg>"  # takes a second

def die_while_saving(operation):
    saves, operations = set(), 0
    def count(event, arguments):
        nonlocal operations
        if event not in ("open", "os.mkdir", "os.rename", "os.chmod"):
            return
        folder, unfinished, _ = str(arguments[0]).partition(".tmp")
        if unfinished and Path(folder).name.startswith("step_"):
            saves.add(folder)
            operations += len(saves) == 3
            if operations == operation:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

for line in sys.stdin:
    recipe, run, stderr, largest, operation = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        if int(largest):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), int(largest)))
        if int(operation):
            die_while_saving(int(operation))
        lm.cli.main.train([recipe, "--run", run])
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class TrainingProcess:
    """``train.py RECIPE --run RUN`` in a process of its own, one at a time."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONUTF8": "1", "COLUMNS": "1000"},
        )

    def start(self, config: Config, run: Path, largest_file: int = 0, die_at_operation: int = 0) -> None:
        recipe, self.stderr = run.with_suffix(".toml"), run.with_suffix(".stderr")
        config.save(recipe)
        self.server.stdin.write(f"{recipe}\t{run}\t{self.stderr}\t{largest_file}\t{die_at_operation}\n".encode())
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())

    def has_ended(self) -> bool:
        return bool(select.select([self.server.stdout], [], [], 0)[0])

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 120
        while not condition() and not self.has_ended():
            assert time.monotonic() < until, self.stderr_text()
            time.sleep(0.05)

    def end(self, number: int = 0) -> int:
        """Send a signal (0: none) and wait for the end: its exit status, or minus the signal that killed it."""
        if number and not self.has_ended():
            os.kill(self.pid, number)
        return int(self.server.stdout.readline())

    def stderr_text(self) -> str:
        return self.stderr.read_text()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(120)


@pytest.fixture(scope="session")
def process() -> Iterator[TrainingProcess]:
    training = TrainingProcess()
    yield training
    training.close()
