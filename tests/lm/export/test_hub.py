"""Uploads to the Hugging Face hub, with a server here in its place."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
from click.testing import CliRunner

from lm.cli.main import main


class Hub(ThreadingHTTPServer):
    """As much of the hub as creating a repository and committing small files needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.public: set[str] = set()
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.token = "hf_right"
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path.startswith("/api/whoami"):
            self.answer({"type": "user", "name": "me", "orgs": [{"name": "lab"}]})
        elif (name := self.path.removeprefix("/api/models/").partition("?")[0]) in self.server.public:
            self.answer({"id": name, "private": False, "tags": []})
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/model/commit/0"})
        else:  # the check of the card's metadata
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()


def pushed(run, out, *arguments: str):
    return CliRunner().invoke(main, ["export", str(run.path), "--out", str(out), *arguments])


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_the_uploaded_files_are_those_of_the_export(make_run, hub, tmp_path, kind):
    run, out = make_run(objective="next_token"), tmp_path / "model"
    done = pushed(run, out, "--to", kind, "--push", "me/model", "--private")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/model"
    here = {path.name: path.read_bytes() for path in (out.iterdir() if kind == "hf" else [out])}
    assert {name: content for name, content in hub.files.items() if name != ".gitattributes"} == here
    (wanted,) = hub.created
    assert (wanted["name"], wanted.get("organization")) == ("model", "me")
    assert is_private(wanted)


def is_private(wanted: dict) -> bool:
    """Older and newer versions of huggingface_hub name it differently."""
    return wanted.get("private") is True or wanted.get("visibility") == "private"


def test_without_private_the_account_decides(make_run, hub, tmp_path):
    done = pushed(make_run(objective="next_token"), tmp_path / "out", "--to", "gguf", "--push", "lab/model")
    assert done.exit_code == 0, done.output
    (wanted,) = hub.created
    assert not is_private(wanted)
    assert wanted.get("organization") == "lab"


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("model", "hf_right", "--push takes USER/NAME"),
        ("me/two words", "hf_right", "--push takes USER/NAME"),
        ("you/model", "hf_right", "you are logged in as me and cannot push to you/model: yours are me, lab"),
        ("me/model", "hf_wrong", "it does not accept your token"),
        ("me/model", "", 'you are not logged in to the Hugging Face hub: run "hf auth login"'),
        ("me/there", "hf_right", "me/there exists and is public: make it private on the hub first"),
    ],
)
def test_what_cannot_be_pushed_is_said_in_one_sentence_before_the_export(
    make_run, hub, tmp_path, monkeypatch, name, token, words
):
    hub.public.add("me/there")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    done = pushed(make_run(objective="next_token"), tmp_path / "out", "--to", "hf", "--push", name, "--private")
    assert done.exit_code == 2
    assert words in done.output
    assert len(done.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not hub.created


def test_a_hub_that_is_away_is_reported(make_run, hub, tmp_path, monkeypatch):
    run = make_run(objective="next_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = pushed(run, tmp_path / "out", "--to", "hf", "--push", "me/model")
    assert "while HF_HUB_OFFLINE is set" in done.output
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    done = pushed(run, tmp_path / "out", "--to", "hf", "--push", "me/model")
    assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
    assert "the Hugging Face hub cannot be reached" in done.output
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_keeps_the_export_and_says_where_it_is(make_run, hub, tmp_path, monkeypatch):
    def refuse(self) -> None:
        self.answer({"error": "the disk is full"}, 507)

    monkeypatch.setattr(Answer, "do_POST", refuse)
    done = pushed(make_run(objective="next_token"), tmp_path / "out", "--to", "hf", "--push", "me/model")
    assert done.exit_code == 2
    assert f"the model is in {tmp_path / 'out'}" in done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
