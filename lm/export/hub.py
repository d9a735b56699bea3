"""Upload an exported model to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.errors import UserError


def check_push(name: str, *, private: bool) -> None:
    """Ask the hub whether ``push`` can succeed, before a long export begins.

    Raises:
        UserError: the name is invalid or not the user's, no user is logged in, the hub cannot be reached, or the
            repository is public and should be private.
    """
    import huggingface_hub
    from huggingface_hub import HfApi, constants, errors

    try:
        huggingface_hub.utils.validate_repo_id(name)
        user, _, _ = name.rpartition("/")
    except errors.HFValidationError:
        user = ""
    if not user:
        raise UserError(f'"{name}" is not a valid name on the Hugging Face hub: --push takes USER/NAME')
    if constants.HF_HUB_OFFLINE:
        raise UserError("cannot push to the Hugging Face hub while HF_HUB_OFFLINE is set")
    if huggingface_hub.get_token() is None:
        raise UserError('you are not logged in to the Hugging Face hub: run "hf auth login", or set HF_TOKEN')
    api = HfApi()
    with _explaining():
        me = api.whoami()
    mine = [me["name"], *(each["name"] for each in me.get("orgs", []))]
    if user.lower() not in [each.lower() for each in mine]:
        raise UserError(f"you are logged in as {me['name']} and cannot push to {name}: yours are {', '.join(mine)}")
    public = False
    with _explaining(), suppress(errors.RepositoryNotFoundError):  # then push creates it
        public = private and not api.model_info(name).private
    if public:
        raise UserError(f"{name} exists and is public: make it private on the hub first, or leave out --private")


def push(path: Path, name: str, *, private: bool) -> str:
    """Upload the folder or file ``path`` to the model repository ``name``, which is created if needed.

    Returns:
        The address of the repository.

    Raises:
        UserError: the upload failed.
    """
    from huggingface_hub import HfApi

    api, message = HfApi(), "Upload a model exported by Kindling"
    with _explaining(f"; the model is in {path}"):
        address = api.create_repo(name, private=private or None, exist_ok=True)  # None: the account's default
        if path.is_dir():
            api.upload_folder(repo_id=name, folder_path=path, commit_message=message)
        else:
            api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name, commit_message=message)
    return str(address)


@contextmanager
def _explaining(addition: str = "") -> Iterator[None]:
    """Turn any error of huggingface_hub, or of the HTTP library that it uses, into a UserError."""
    try:
        yield
    except Exception as error:  # their base classes differ between versions
        raise UserError(_explained(error) + addition) from None


def _explained(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code
        reason = "it does not accept your token" if code in (401, 403) else f"it answered {code}"
        return f"the Hugging Face hub refused: {reason} ({error.server_message or error})".replace("\n", " ")
    away = isinstance(error, OSError) or any(word in type(error).__name__ for word in ("Connect", "Timeout"))
    return f"the Hugging Face hub {'cannot be reached' if away else 'failed'}: {error}".split("\n")[0]
