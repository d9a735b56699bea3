from __future__ import annotations

from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from data_prep.errors import UserError
from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.find import find_tokenizer_file
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.training import train_tokenizer


def test_a_file_and_its_folder_are_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter([]), TokenizerSettings("bytes"))
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "other.model").write_bytes(b"not looked at")
    assert load_tokenizer(tmp_path).sha256 == load_tokenizer(tmp_path / "tokenizer.json").sha256 == tokenizer.sha256


def test_a_folder_without_exactly_one_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains neither a tokenizer\.json nor a \.model file"):
        find_tokenizer_file(tmp_path)
    (tmp_path / "a.model").touch()
    assert find_tokenizer_file(tmp_path) == tmp_path / "a.model"
    (tmp_path / "b.model").touch()
    with pytest.raises(UserError, match=r"contains 2 \.model files: name the one to use"):
        find_tokenizer_file(tmp_path)


@pytest.mark.parametrize("name", ["missing.json", "a/b.model", "/no/such/folder", "a/b/c", "../up"])
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="there is no tokenizer file"):
        find_tokenizer_file(name)


def test_the_hub_is_asked_for_each_file_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        if file == "tokenizer.json":
            raise errors.EntryNotFoundError("no such file")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_tokenizer_file("someone/model-7B.v2") == tmp_path / "tokenizer.model"
    assert asked == [("someone/model-7B.v2", file) for file in ("tokenizer.json", "tokenizer.model")]


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://example.org"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("no network"), "the Hugging Face Hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the Hugging Face Hub cannot be reached"),
        (errors.RepositoryNotFoundError("404", response=response(404)), 'no Hugging Face repository "someone/model"'),
        (errors.GatedRepoError("403", response=response(403)), "you have no access to .*: request it"),
        (
            errors.HfHubHTTPError("500", response=response(500)),
            "cannot download the tokenizer .* from the Hugging Face Hub",
        ),
        (errors.EntryNotFoundError("no such file"), r"contains none of tokenizer\.json, tokenizer\.model"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, file: str) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=message):
        load_tokenizer("someone/model")
