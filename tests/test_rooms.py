"""The rooms stand on floors: an import only leads down, and no room imports another in a circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; rooms on one line do not know each other.
FLOORS = {
    "lm": (
        "__init__",
        "config kernels",
        "model data",
        "objectives runs inference",
        "training export serve",
        "finetuning",
        "evaluation",
        "reports",
        "api",
        "cli",
    ),
    "data_prep": (
        "errors",
        "files progress",
        "settings",
        "sources",
        "cleaning tokenizers",
        "shards",
        "pipeline",
        "__init__",
        "cli",
        "__main__",
    ),
}
# Lower floors, but none of their business. Export takes from inference only what it writes down: the chat template, and
# how a text becomes a vector.
NEVER = {("serve", "objectives"), ("export", "objectives"), ("training", "inference")}
# What any room of lm may take of data_prep, and what some rooms may take besides.
FACES = {"errors", "files", "settings", "tokenizers", "shards"}
MORE = {"data": {"sources"}, "evaluation": {"sources"}, "training": {"progress"}, "cli": {"cli", "sources"}}
MOST_ENTRIES = {"lm": 16, "data_prep": 12}


def imports_of(package: str, path: Path, source: str) -> Iterator[tuple[str, str, str]]:
    """(room, package, room) of each import in a file that leads out of its room."""
    room = path.with_suffix("").parts[0]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" if module in FLOORS else module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            other, _, rest = name.partition(".")
            if other in FLOORS:
                target = rest.partition(".")[0]
                is_room = (ROOT / other / target).is_dir() or (ROOT / other / f"{target}.py").is_file()
                target = target if target and is_room else "__init__"
                if (other, target) != (package, room):
                    yield room, other, target


def imports(package: str) -> Iterator[tuple[Path, str, str, str]]:
    """(file, its room, package, room) of each import between rooms, lazy ones too."""
    for path in sorted((ROOT / package).rglob("*.py")):
        relative = path.relative_to(ROOT / package)
        for room, other, target in imports_of(package, relative, path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT), room, other, target


def leads_down(package: str, room: str, target: str) -> bool:
    floor = {name: number for number, rooms in enumerate(FLOORS[package]) for name in rooms.split()}
    if (package, room, target) == ("lm", "__init__", "api"):
        return True  # the package's face, which imports it when a name is first used
    return floor[target] < floor[room] and (room, target) not in NEVER


def may_take(room: str, target: str) -> bool:
    """Whether a room of lm may import this part of data_prep; the Python face may take the other one's."""
    return target in FACES | MORE.get(room, set()) or (room, target) == ("api", "__init__")


@pytest.mark.parametrize("package", FLOORS)
def test_an_import_only_leads_down(package):
    wrong = {
        f"{path} ({room}) -> {other}.{target}"
        for path, room, other, target in imports(package)
        if other == package and not leads_down(package, room, target)
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_data_prep_imports_nothing_of_lm():
    assert not [str(path) for path, _, other, _ in imports("data_prep") if other == "lm"]


def test_lm_takes_of_data_prep_only_its_faces():
    wrong = {
        f"{path} ({room}) -> data_prep.{target}"
        for path, room, other, target in imports("lm")
        if other == "data_prep" and not may_take(room, target)
    }
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor_and_there_are_not_too_many(package):
    entries = {path.name for path in (ROOT / package).iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ENTRIES[package]
    assert {entry.removesuffix(".py") for entry in entries} <= {
        name for rooms in FLOORS[package] for name in rooms.split()
    }


def files_imported_by(path: Path, source: str) -> set[str]:
    """The files of this project that a file imports, lazily or not, but for the sake of types."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        files = [name.replace(".", "/") + ".py" for name in names if name.partition(".")[0] in FLOORS]
        found |= {file for file in files if (ROOT / file).is_file()}
    return found - {path.as_posix()}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The files of an import circle, or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle():
    paths = [path for package in FLOORS for path in (ROOT / package).rglob("*.py")]
    graph = {
        path.relative_to(ROOT).as_posix(): files_imported_by(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
        for path in paths
    }
    assert circle_in(graph) == []
    one, two = "lm/training/trainer.py", "lm/training/optimizer.py"
    graph[two] |= files_imported_by(Path(two), "def f():\n    from lm.training import trainer")
    assert {one, two} <= set(circle_in(graph))


@pytest.mark.parametrize(
    ("package", "file", "line"),
    [
        ("lm", "config/settings.py", "from lm.training.trainer import fit"),
        ("lm", "model/transformer.py", "from lm.data import batch"),  # on the same floor
        ("lm", "training/trainer.py", "def f():\n    import lm.inference.generator"),  # lazily, and never
        ("lm", "serve/app.py", "from lm import objectives"),
        ("data_prep", "files.py", "from data_prep.shards.tokens import Dataset"),
        ("data_prep", "shards/tokens.py", "from data_prep import build"),  # the package's own face
    ],
)
def test_an_import_that_leads_up_is_found(package, file, line):
    ((room, other, target),) = imports_of(package, Path(file), line)
    assert other == package
    assert not leads_down(package, room, target)


def test_an_import_of_more_than_the_faces_is_found():
    ((room, other, target),) = imports_of("lm", Path("model/transformer.py"), "from data_prep.pipeline import build")
    assert other == "data_prep"
    assert not may_take(room, target)


def test_importing_lm_loads_no_torch():
    code = "import lm, sys; print('torch' in sys.modules, len(dir(lm)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
