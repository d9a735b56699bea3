"""How messages name commands and recipes: as the user would type them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

SCRIPTS = ("train", "sample", "evaluate", "finetune")  # commands that are also a script in a checkout


def command(name: str) -> str:
    """Return a command such as ``train`` or ``prep build``, spelled the way this process was started.

    That is ``kindling train`` or, in a checkout, ``python train.py`` and ``python -m data_prep build``.
    """
    started = Path(sys.argv[0])
    is_script = started.suffix == ".py" and started.stem in SCRIPTS
    is_module = started.parts[-2:] == ("data_prep", "__main__.py")
    if name in SCRIPTS and is_script:
        return f"python {started.with_name(f'{name}.py')}"
    if name in SCRIPTS and is_module and Path("train.py").is_file():
        return f"python {name}.py"
    if name.startswith("prep ") and (is_script or is_module):
        return f"python -m data_prep {name.removeprefix('prep ')}"
    return f"kindling {name}"


def example_recipe(name: str = "tiny") -> str:
    """Return a recipe as messages name it: a file of the checkout, or a name that works anywhere."""
    file = Path("configs", f"{name}.toml")
    return str(file) if command("train").startswith("python") and file.is_file() else file.stem


def text_and_out(directory: Path) -> str:
    """Return arguments of a build for a file, or a folder that is not a dataset, but may contain the text for one."""
    if directory.is_file():
        return f"{shlex.quote(str(directory))} --out {shlex.quote(str(Path('data') / directory.stem))}"
    if all(path.name == ".lock" for path in directory.iterdir()):  # what a killed build leaves
        return f"YOUR_TEXT --out {shlex.quote(str(directory))}"
    out = Path("data") / directory.resolve().name
    if out.resolve() == directory.resolve():
        out = out.with_name(f"{out.name}-tokens")
    return f"{shlex.quote(str(directory))} --out {shlex.quote(str(out))}"
