"""Where a tokenizer is: a file, a folder that holds one, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.errors import UserError

# The files of a hub repository that may hold its tokenizer; the first one present is taken.
HUB_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")
HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def find_tokenizer_file(source: str | Path) -> Path:
    """The ``tokenizer.json`` or sentencepiece ``.model`` that ``source`` means.

    A path that exists is never looked up on the hub. Raises ``UserError`` if nothing is there.
    """
    path = Path(source)
    if path.is_dir():
        return _file_in_folder(path)
    if path.exists():
        return path
    name = str(source)
    if HUB_NAME.fullmatch(name) and path.suffix not in (".json", ".model"):
        return _file_from_hub(name)
    raise UserError(f'there is no tokenizer file "{source}"')


def _file_in_folder(folder: Path) -> Path:
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    if models:
        raise UserError(f'the folder "{folder}" holds {len(models)} .model files: name the one to use')
    raise UserError(f'"{folder}" is not a tokenizer: the folder holds neither a tokenizer.json nor a .model file')


def _file_from_hub(name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    for file in HUB_FILES:
        try:
            return Path(hf_hub_download(name, file))
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            raise UserError(
                f'there is no file or folder "{name}", and the Hugging Face hub cannot be reached to look for a '
                "tokenizer of that name: give the path of a tokenizer.json"
            ) from None
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError:
            raise UserError(
                f'"{name}" on the Hugging Face hub is closed to you: ask for access on its page, then call '
                '"hf auth login"'
            ) from None
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            raise UserError(f'there is no file, no folder and no Hugging Face repository "{name}"') from None
        except (errors.HfHubHTTPError, OSError) as error:
            raise UserError(f'the tokenizer "{name}" did not come from the Hugging Face hub: {error}') from None
    raise UserError(f'the Hugging Face repository "{name}" holds none of {", ".join(HUB_FILES)}')
