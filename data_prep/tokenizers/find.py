"""Find a tokenizer: in a file, in a folder, or by its name on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.errors import UserError

# The files of a Hub repository that may contain its tokenizer; the first one present is used.
HUB_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")
HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def find_tokenizer_file(source: str | Path) -> Path:
    """Return the path of the ``tokenizer.json`` or sentencepiece ``.model`` that ``source`` refers to.

    An existing path is never looked up on the Hub. Raises ``UserError`` if nothing is found.
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
        raise UserError(f'the folder "{folder}" contains {len(models)} .model files: name the one to use')
    raise UserError(f'"{folder}" is not a tokenizer: the folder contains neither a tokenizer.json nor a .model file')


def _file_from_hub(name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    for file in HUB_FILES:
        try:
            return Path(hf_hub_download(name, file))
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            raise UserError(
                f'there is no file or folder "{name}", and the Hugging Face Hub cannot be reached to look for a '
                "tokenizer of that name: give the path of a tokenizer.json"
            ) from None
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError:
            raise UserError(
                f'you have no access to "{name}" on the Hugging Face Hub: request it on the model page, then run '
                '"hf auth login"'
            ) from None
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            raise UserError(f'there is no file, no folder and no Hugging Face repository "{name}"') from None
        except (errors.HfHubHTTPError, OSError) as error:
            raise UserError(f'cannot download the tokenizer "{name}" from the Hugging Face Hub: {error}') from None
    raise UserError(f'the Hugging Face repository "{name}" contains none of {", ".join(HUB_FILES)}')
