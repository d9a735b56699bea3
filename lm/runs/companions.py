"""Files of a checkpoint that its run directory keeps as ``transformers`` names and writes them.

``tokenizer.json`` knows what begins and ends a text (``data_prep.tokenizers.special_tokens``). These files hold the
rest of what an imported checkpoint brought, for sampling and for the next export.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_prep.files import read_json
from lm.config.sampling import GENERATION

CHAT_TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def copy_companions(source: Path, target: Path) -> None:
    """Copy these files from one run directory to another that lacks them."""
    for name in (CHAT_TEMPLATE, GENERATION, TOKENIZER_CONFIG):
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


def companion(run_directory: Path, name: str) -> dict[str, Any]:
    """The content of a run's ``generation_config.json`` or ``tokenizer_config.json``; {} if it has none."""
    path = run_directory / name
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    return content
