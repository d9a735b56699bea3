"""Open a tokenizer, from whatever a user names: a file, a folder, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.tokenizers.find import find_tokenizer_file
from data_prep.tokenizers.sentencepiece import convert_model
from data_prep.tokenizers.tokenizer import Tokenizer


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Read a ``tokenizer.json``, a sentencepiece ``.model``, a folder that holds one, or a name on the hub.

    Special tokens that it lacks are added after its last id. A ``.model`` becomes an equal ``tokenizer.json``, or
    is refused if none gives the same ids.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    path = find_tokenizer_file(source)
    if path.suffix == ".model":
        return Tokenizer.from_json(convert_model(path), name=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f'"{path}" is not a tokenizer.json file') from None
    return Tokenizer.from_json(text, name=str(path))
