"""Windows and macOS by simulation: nothing that only Unix or only Linux has is needed to prepare, train and sample."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import sentences

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "lm").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py"), *ROOT.glob("*.py")])

# What Python on Windows lacks.
MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "curses", "syslog"}
NAMES = {
    "os": "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC chown chroot confstr fchdir fchmod fchown fork forkpty "
    "getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getsid getuid initgroups killpg lchown "
    "mkfifo mknod nice openpty pathconf pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev "
    "readv register_at_fork sched_getaffinity sched_setaffinity sendfile setegid seteuid setgid setpgid setpriority "
    "setsid setuid statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4 writev",
    "signal": "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH alarm "
    "pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigwait SIG_BLOCK SIG_SETMASK SIG_UNBLOCK",
    "time": "clock_gettime clock_settime pthread_getcpuclockid tzset",
    "socket": "AF_UNIX",
}
# Where one is used only after asking whether it is there.
GUARDED = {
    ("lm/cli/chat.py", "readline"),
    ("data_prep/settings.py", "os.sched_getaffinity"),
    # Where the library of threads was found, which is that of Linux.
    ("lm/model/threads.py", "os.sched_getaffinity"),
    ("lm/model/threads.py", "os.sysconf"),
    ("data_prep/pipeline/workers.py", "signal.pthread_sigmask"),
    ("data_prep/pipeline/workers.py", "signal.SIG_BLOCK"),
    ("data_prep/pipeline/workers.py", "signal.SIG_SETMASK"),
}
# Triton has wheels for Linux only.
NEED_TRITON = {"attention_triton", "cross_entropy_triton", "decoding_step_triton", "decoding_triton", "rotary_triton"}

# A process in which our code, but no package, misses all this, and in which files.py and device.py see no Linux.
WINDOWS = """
import builtins, json, os, pkgutil, signal, sys, importlib
from pathlib import Path

root, modules = sys.argv[1], set(sys.argv[2].split())
sys.path.insert(0, root)
import_anything = builtins.__import__

def import_as_on_windows(name, globals=None, *rest, **more):
    importer = (globals or {}).get("__file__") or ""
    if name.partition(".")[0] in modules and importer.startswith(root + os.sep) and "/.venv/" not in importer:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_anything(name, globals, *rest, **more)

builtins.__import__ = import_as_on_windows
from data_prep import files
files.WINDOWS = True
open_any = os.open

def open_no_directory(path, *rest, **more):
    if Path(path).is_dir():
        raise PermissionError(13, "Permission denied", str(path))
    return open_any(path, *rest, **more)

os.open = open_no_directory

def modules_of(package):
    return [each.name for each in pkgutil.walk_packages([str(Path(root, package))], package + ".")]
"""
IMPORT_ALL = """
failed = []
for name in [*modules_of("data_prep"), *modules_of("lm"), "train", "sample", "evaluate", "finetune"]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failed.append(f"{name} {error.name}")
print(json.dumps(failed))
"""
BUILD_TRAIN_SAMPLE = """
import multiprocessing.resource_tracker, torch
import lm.api, lm.cli.main
from data_prep.pipeline import workers
from lm.model import device

del os.sched_getaffinity, os.sysconf, signal.pthread_sigmask  # of what our code might use, all that no package needs
multiprocessing.resource_tracker._HAVE_SIGMASK = False
workers.START_METHOD = "spawn"
device._numbers = lambda path: {}  # no /proc
device._group_headrooms = lambda *paths: []

def kindling(*arguments):
    lm.cli.main.main.main(arguments, standalone_mode=False)

kindling("prep", "build", "text", "--out", "data", "--vocab-size", "300", "--workers", "2", "--part-bytes", "20000")
kindling("train", "tiny.toml", "--data", "data", "--run", "run")
kindling("sample", "run", "--prompt", "The", "--max-new-tokens", "4", "--temperature", "0")
kindling("export", "run", "--to", "hf", "--out", "exported")
assert 1e6 < device.resident_memory() <= device.peak_memory(torch.device("cpu")) * 1.5
print(device.available_memory(torch.device("cpu")))
"""
RECIPE = """
[model]
hidden_size = 16
num_layers = 1
num_heads = 2
[data]
context_length = 32
batch_tokens = 128
[training]
steps = 3
device = "cpu"
threads = 1
"""


def used(source: str) -> Iterator[str]:
    """The modules and names of ``MODULES`` and ``NAMES`` that a file uses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from MODULES & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from MODULES & {node.module.partition(".")[0]}
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name in NAMES.get(node.module, "").split())
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from (f"{node.value.id}.{n}" for n in NAMES.get(node.value.id, "").split() if n == node.attr)


def test_nothing_that_windows_lacks_is_used_unasked():
    found = {
        (path.relative_to(ROOT).as_posix(), name) for path in SOURCES for name in used(path.read_text(encoding="utf-8"))
    }
    assert found == GUARDED


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f():\n    import fcntl", "fcntl"),
        ("from resource import getrusage", "resource"),
        ("import os\nos.sysconf('SC_PAGE_SIZE')", "os.sysconf"),
        ("from signal import SIGHUP", "signal.SIGHUP"),
    ],
)
def test_what_windows_lacks_is_found(source, name):
    assert list(used(source)) == [name]


def simulated(program: str, folder: Path) -> list[str]:
    """Run a program as ``WINDOWS`` describes, and return the lines of its output."""
    arguments = [str(ROOT), " ".join([*MODULES, "triton"])]
    command = [sys.executable, "-c", WINDOWS + program, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_module_imports_without_what_windows_lacks(tmp_path):
    failed = json.loads(simulated(IMPORT_ALL, tmp_path)[-1])
    failed = [each for each in failed if not each.endswith(" lm_eval")]  # the tests do without this package
    assert failed == [f"lm.kernels.{name} triton" for name in sorted(NEED_TRITON)]


def test_a_dataset_is_built_and_a_model_trained_sampled_and_exported(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(sentences(300, number), encoding="utf-8", newline="\r\n")
    (tmp_path / "tiny.toml").write_text(RECIPE, encoding="utf-8", newline="\r\n")
    lines = simulated(BUILD_TRAIN_SAMPLE, tmp_path)
    assert any(line.startswith("The") for line in lines)
    assert int(lines[-1]) > 1e6
    left = {path.name for path in tmp_path.rglob("*") if path.name.endswith((".lock", ".tmp", ".partial"))}
    assert left == set()
    assert b"\r" not in (tmp_path / "run" / "metrics.jsonl").read_bytes()
