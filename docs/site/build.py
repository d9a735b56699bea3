"""Build the documentation site: ``python docs/site/build.py OUT`` writes OUT/html (``make docs``: build/docs).

The pages are those of the repository. A page for each command is made from its help, and a page of the Python interface
from the docstrings. A warning, such as a dead link, fails the build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from lm.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s#]+)")
SECTIONS = {
    "Start here": ("docs/tutorial", "docs/languages"),
    "Data": ("docs/data", "docs/cleaning", "docs/shard-format"),
    "Train and use": ("docs/training", "docs/sweeps", "docs/images", "docs/sampling", "docs/serving", "docs/export"),
    "Tasks and evaluation": ("docs/finetuning", "docs/tasks", "docs/evaluation", "docs/blimp", "docs/babylm"),
    "Reference": ("docs/python", "docs/api", "docs/commands/index"),
    "Inside": ("docs/design", "docs/results", "docs/performance", "docs/lab-notes", "CONTRIBUTING", "CHANGELOG"),
}
API = {
    "Pretrain, fine-tune, evaluate": ("autofunction", ("lm.load", "lm.train", "lm.finetune", "lm.evaluate")),
    "What lm.load returns": ("autoclass", ("lm.api.Model", "lm.api.TaskModel", "lm.api.ImageModel")),
    "Settings and errors": ("autoclass", ("lm.Sampling", "lm.Run", "lm.UserError")),
    "Datasets": (
        "autofunction",
        (
            "data_prep.build",
            "data_prep.open_dataset",
            "data_prep.build_images",
            "data_prep.open_images",
            "data_prep.build_visual_tokens",
        ),
    ),
}


def pages() -> list[Path]:
    """The pages of the repository, relative to it."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    return sorted(page.relative_to(ROOT) for page in found)


def copy_pages(source: Path) -> None:
    """Copy every page, and every file that a page links to, to the same place below ``source``."""
    for page in pages():
        linked = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
        files = [(ROOT / page.parent / link).resolve() for link in linked if "://" not in link]
        for file in [ROOT / page, *files]:
            if file.is_file():
                to = source / file.relative_to(ROOT)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """Each command with its full name, those of groups in groups too."""
    for part, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def help_of(name: str) -> str:
    """What ``--help-all`` of a command prints, or ``--help`` where there is no longer one."""
    arguments = name.split()[1:]
    printed = [
        CliRunner().invoke(main, [*arguments, option], prog_name="kindling") for option in ("--help-all", "--help")
    ]
    return next(result.output for result in printed if result.exit_code == 0)


def write_commands(folder: Path) -> None:
    """A page for each command, and their index."""
    folder.mkdir(parents=True)
    rows = []
    for name, command in commands(main, "kindling"):
        page = name.removeprefix("kindling ").replace(" ", "-")
        (folder / f"{page}.md").write_text(f"# {name}\n\n```text\n{help_of(name)}```\n", encoding="utf-8")
        rows.append((name, page, command.get_short_help_str(limit=200)))
    table = "".join(f"| [{name}]({page}.md) | {summary} |\n" for name, page, summary in rows)
    toctree = "\n".join(page for _, page, _ in rows)
    text = f"# Commands\n\n| command | what it does |\n|---|---|\n{table}\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"
    (folder / "index.md").write_text(text, encoding="utf-8")


def write_api(page: Path) -> None:
    """The public functions and classes with their docstrings."""
    parts = ["# Python API\n\nEvery name with its arguments; for examples, see [the Python interface](python.md).\n"]
    for title, (directive, names) in API.items():
        members = "\n   :members:" if directive == "autoclass" else ""
        body = "\n\n".join(f".. {directive}:: {name}{members}" for name in names)
        parts.append(f"\n## {title}\n```{{eval-rst}}\n{body}\n```\n")
    page.write_text("".join(parts), encoding="utf-8")


def write_sources(source: Path) -> None:
    """Everything that Sphinx reads."""
    copy_pages(source)
    write_commands(source / "docs" / "commands")
    write_api(source / "docs" / "api.md")
    listed = {page for section in SECTIONS.values() for page in section}
    others = [str(page.with_suffix("")) for page in pages() if str(page.with_suffix("")) not in {*listed, "README"}]
    sections = SECTIONS | {"Inside": (*SECTIONS["Inside"], *others)}
    trees = [
        f"\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n{chr(10).join(its)}\n```\n" for name, its in sections.items()
    ]
    with (source / "README.md").open("a", encoding="utf-8") as file:
        file.writelines(trees)


def build(out: Path) -> int:
    """Write the site to ``out / "html"``, and return the exit status of Sphinx."""
    shutil.rmtree(out, ignore_errors=True)
    write_sources(out / "source")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(Path(__file__).parent)]
    status = subprocess.call([sys.executable, "-m", "sphinx", *options, str(out / "source"), str(out / "html")])
    if not status:
        shutil.copyfile(out / "html" / "README.html", out / "html" / "index.html")
    return status


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1])))
