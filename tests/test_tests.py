"""What makes the tests independent of each other and of how busy the machine is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.rglob("*.py"))
# A test patches what a module calls "time" or "os". What belongs to the standard library itself belongs to all threads
# of the process: a server that a fixture runs in a thread once slept for hours on the clock of another test.
STANDARD = sys.stdlib_module_names - {"sys"}
HARMLESS = {"os.fsync"}  # no other thread depends on it
CLOCKS = {"time.perf_counter", "time.process_time", "time.thread_time", "time.time", "resource.getrusage"}
WRITES_TIMES = {"make.py"}  # not a test


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def patched(call: ast.Call) -> str:
    """What ``setattr(owner, name, …)``, ``setattr("owner.name", …)`` or ``mock.patch`` changes; "" for other calls."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("setattr", "delattr", "object", "patch"):
        return ""
    owner, *others = [arg.value if isinstance(arg, ast.Constant) else ast.unparse(arg) for arg in call.args]
    return str(owner) if isinstance(call.args[0], ast.Constant) else f"{owner}.{others[0]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_test_patches_the_standard_library_for_the_whole_process(path):
    for call in calls(path):
        name = patched(call)
        assert name in HARMLESS or not STANDARD & set(name.split(".")[:-1]), f"{path.name}:{call.lineno} patches {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_test_measures_time(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in CLOCKS or path.name in WRITES_TIMES, f"{path.name}:{call.lineno} calls {name}"
