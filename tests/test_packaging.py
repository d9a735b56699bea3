"""What must hold for the package as a whole."""

from __future__ import annotations

import ast
import configparser
import importlib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import lm

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "lm").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py"), *ROOT.glob("*.py")])
SETUP = configparser.ConfigParser(inline_comment_prefixes=None)
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def requirements() -> list[Requirement]:
    wanted = lines_of(SETUP["options"]["install_requires"])
    for extra in SETUP["options.extras_require"].values():
        wanted += lines_of(extra)
    return [Requirement(line) for line in wanted]


def pinned() -> dict[str, str]:
    pins = [line.split(";")[0].strip().split("==") for line in lines_of((ROOT / "constraints.txt").read_text())]
    return {canonicalize_name(name): version for name, version in pins}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> set[str]:
    """The first part of the name of every module that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} imports relatively"
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_pinned_version_of_every_requirement_is_in_its_range(requirement):
    version = pinned()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)
    assert requirement.specifier, "a requirement has at least a lower limit"


def test_everything_imported_is_required():
    """The names under which packages are imported are those under which they are installed, but for these."""
    other_names = {"tomli_w": "tomli-w", "splintr": "splintr-rs", "sklearn": "scikit-learn", "PIL": "pillow"}
    required = {canonicalize_name(requirement.name) for requirement in requirements()}
    standard = set(__import__("sys").stdlib_module_names) | {"lm", "data_prep"}
    for path in SOURCES:
        for name in imports_of(path) - standard:
            assert canonicalize_name(other_names.get(name, name)) in required, f"{relative(path)} imports {name}"


def test_this_python_is_supported():
    version = ".".join(map(str, __import__("sys").version_info[:3]))
    assert SpecifierSet(SETUP["options"]["python_requires"]).contains(version)


def test_the_console_command_exists():
    for line in lines_of(SETUP["options.entry_points"]["console_scripts"]):
        _, target = map(str.strip, line.split("="))
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_the_packages_own():
    assert SETUP["metadata"]["version"] == "attr: lm.__version__"
    assert lm.__version__.count(".") == 2


def test_data_files_that_are_packaged_exist():
    for package, patterns in SETUP["options.package_data"].items():
        for pattern in lines_of(patterns.replace(",", "\n")):
            assert list((ROOT / package).glob(pattern)), pattern
    for patterns in SETUP["options.data_files"].values():
        for pattern in lines_of(patterns.replace(",", "\n")):
            assert list(ROOT.glob(pattern)), pattern


def packaged() -> set[Path]:
    """The files that setuptools puts into the wheel, by what setup.cfg says."""
    data = [pattern for patterns in SETUP["options.data_files"].values() for pattern in lines_of(patterns)]
    found = {path for pattern in data for path in ROOT.glob(pattern)}
    for package, patterns in SETUP["options.package_data"].items():
        found |= {path for pattern in patterns.split(",") for path in (ROOT / package).glob(pattern.strip())}
        for start in (ROOT / package).rglob("__init__.py"):
            above = [folder for folder in start.relative_to(ROOT).parents if folder != Path()]
            if all((ROOT / folder / "__init__.py").is_file() for folder in above):
                found |= set(start.parent.glob("*.py"))
    return found


def test_every_file_of_the_packages_and_every_recipe_is_in_the_wheel():
    wanted = set(ROOT.glob("configs/*"))
    for package in ("lm", "data_prep"):
        files = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        wanted |= {path for path in files if not path.name.startswith(".")}
    assert not sorted(map(relative, wanted - packaged()))
    assert {ROOT / "lm" / "cli" / "main.py", ROOT / "configs" / "tiny.toml"} <= packaged()


def test_the_citation_names_this_version_and_license():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {lm.__version__}\n" in citation
    assert f"\nlicense: {SETUP['metadata']['license']}\n" in citation
    assert f"\n## {lm.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_too_long_to_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", [path for path in SOURCES if "data_prep" in path.parts], ids=relative)
def test_data_preparation_needs_neither_the_model_nor_torch(path):
    assert not imports_of(path) & {"lm", "torch"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_unpickles_or_evaluates_code(path):
    assert not imports_of(path) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__"), f"{called} in line {node.lineno}"
            assert called not in ("torch.load", "np.load", "numpy.load"), f"{called} in line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_names_a_place_on_the_machine_it_was_written_on(path):
    text = path.read_text(encoding="utf-8")
    assert not any(place in text for place in ("/home/", "/root/", "/Users/"))
