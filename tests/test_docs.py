"""The documentation names only files, modules and commands that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lm.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGES = ("lm", "data_prep", "benchmarks", "tests")
PATH = re.compile(r"(?<![\w./~-])(?:lm|data_prep|tests|docs|configs|benchmarks)/[\w.*/-]*[\w*/]")
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+\b(?!/)")
PYTHON_FILE = re.compile(r"(?<![\w./-])\w+\.py\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCES = sorted([*PAGES, *(ROOT / "lm").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])
STEMS = (
    "capital|character|custom|emphas|familiar|final|general|initial|local|maxim|memor|minim|normal|optim|organ|orthogonal|"
    "parallel|penal|priorit|quant|real|recogn|regular|serial|special|summar|synchron|token|util|visual"
)
BRITISH = re.compile(
    rf"(?:{STEMS})(?:is(?:e[ds]?|er|ers|ing|ation|ations|able)(?![a-z]))"
    r"|(?:behavi|col|fav|flav|harb|hon|lab|neighb|rum)our(?!e)"
    r"|(?:label|model|signal|travel|level)l(?:ed|ing|er)"
    r"|\b(?:analyse[ds]?|artefacts?|catalogue|centre[ds]?|defence|grey|learnt|licence|programmes?|spelt|whilst|amongst)\b"
)
# Each has a plain word: overfitting, most likely, resume, again, in both directions, report, fix, next to.
PRIVATE = re.compile(
    r"by heart|likeliest|whoever|\banew\b|both[ _]ways|\bgoes on\b|\b(?:go|going|went) on (?:where|at|with|from)\b"
    r"|(?<![a-z])(?:told|tells)(?![a-z])|(?<![a-z])(?:mends?|mended)(?![a-z])|\bbeside\b|\blets? go\b"
)


def files_that_a_page_adds(text: str) -> set[str]:
    """The files whose content a page of docs/adding-*.md gives; they exist only in the copy of its test."""
    return set(re.findall(r"`((?:lm|tests)/[\w/]+\.py)`(?::\n+```python\n|: compare)", text))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def names_in(tree: ast.Module | ast.ClassDef) -> set[str]:
    """What a module or a class defines or imports; of a module with ``__getattr__``, each string too."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    if "__getattr__" in found:
        found |= {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    return found


def exists(dotted: str) -> bool:
    """Whether ``lm.room.module.Class.attribute`` is there, as far as it can be seen without importing."""
    path, parts = ROOT, dotted.split(".")
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").is_file():
        path /= f"{parts.pop(0)}.py"
    else:
        path /= "__init__.py"
    if not parts:
        return path.is_file() or path.parent.is_dir()
    if not path.is_file():
        return False
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if parts[0] not in names_in(tree):
        return False
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == parts[0]]
    return len(parts) == 1 or not classes or parts[1] in names_in(classes[0])


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_path_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    added = files_that_a_page_adds(text)
    missing = {path for path in PATH.findall(text) if not list(ROOT.glob(path))} - added
    assert not missing, f"{relative(page)} names {', '.join(sorted(missing))}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_module_and_name_in_it_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    added = {file.removesuffix(".py").replace("/", ".") for file in files_that_a_page_adds(text)}
    missing = {name for name in DOTTED.findall(text) if not exists(name)} - added
    assert not missing, f"{relative(page)} names {', '.join(sorted(missing))}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_python_file_that_a_page_names_without_its_folder_exists(page):
    known = {path.name for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    known |= {path.name for path in ROOT.glob("*.py")}
    missing = set(PYTHON_FILE.findall(page.read_text(encoding="utf-8"))) - known
    assert not missing, f"{relative(page)} names {', '.join(sorted(missing))}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_inside_the_documentation_leads_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{relative(page)} links to {link}"


def anchors(page: Path) -> set[str]:
    """What GitHub and the site call the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.+?) *$", text, re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).lower().replace(" ", "-")
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_to_a_heading_finds_it(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if anchor and "://" not in link and target.suffix == ".md":
            assert anchor in anchors(target), f"{relative(page)} links to {link}"


def test_a_heading_is_called_as_on_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One: a `b`, and [c](d.md)\n```\n# no heading\n```\n## Two\n## Two\n", encoding="utf-8")
    assert anchors(page) == {"one-a-b-and-c", "two", "two-1"}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_that_a_page_names_exists(page):
    called = re.findall(r"(?:`|^|\$ )kindling ([a-z]+)\b", page.read_text(encoding="utf-8"), re.M)
    assert set(called) <= set(main.commands), relative(page)


@pytest.mark.parametrize(
    "name", ["lm.training.optimiser", "lm.training.trainer.Missing", "lm.missing", "data_prep.shards.tokens.Dataset.x"]
)
def test_a_name_that_does_not_exist_is_found(name):
    assert not exists(name)


@pytest.mark.parametrize("package", ["lm", "data_prep"])
def test_the_tree_in_the_readme_has_a_line_for_each_room_and_file(package):
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n{package}/ ")[2]
    shown = re.findall(r"^[├└]── ([\w.]+)/? +\S", tree.partition("\n```")[0].split("\ndata_prep/ ")[0], re.M)
    files = {entry.name for entry in (ROOT / package).iterdir()} - {"__init__.py", "__main__.py", "__pycache__"}
    assert set(shown) == files


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_spelling_is_american(path):
    text = path.read_text(encoding="utf-8").lower()
    assert not (found := sorted({match.group() for match in BRITISH.finditer(text)})), f"{relative(path)}: {found}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_words_are_those_of_the_field(path):
    text = path.read_text(encoding="utf-8").lower()
    assert not (found := sorted({match.group() for match in PRIVATE.finditer(text)})), f"{relative(path)}: {found}"


@pytest.mark.parametrize("word", ["normalised", "optimiser", "colour", "labelled", "neighbours", "learnt", "modelling"])
def test_british_spellings_are_found(word):
    assert BRITISH.search(word)


@pytest.mark.parametrize(
    "word",
    ["promise", "precision", "specialist", "realistic", "tokens", "exercise", "raise", "four", "our", "hour", "noise"],
)
def test_other_words_are_not(word):
    assert not BRITISH.search(word)
