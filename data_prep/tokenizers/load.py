"""Load a tokenizer from a file, a folder, or a name on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.tokenizers.find import find_tokenizer_file
from data_prep.tokenizers.sentencepiece import convert_model
from data_prep.tokenizers.tokenizer import Tokenizer


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a ``tokenizer.json``, a sentencepiece ``.model``, a folder with either, or a name on the Hub.

    Missing special tokens are added after the last id. A ``.model`` is converted to an equivalent ``tokenizer.json``,
    or rejected if none gives the same ids.

    Raises:
        UserError: the tokenizer does not exist or cannot be read.
    """
    path = find_tokenizer_file(source)
    if path.suffix == ".model":
        return Tokenizer.from_json(convert_model(path), name=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f'"{path}" is not a tokenizer.json file') from None
    return Tokenizer.from_json(text, name=str(path))
