from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lm import api
from lm.cli.main import main
from lm.serve import server

ROOT = Path(__file__).parents[3]


@pytest.fixture
def kindling(monkeypatch):
    """Run ``kindling serve …``, which returns as soon as it would answer requests, with the applications it made."""
    apps = []
    monkeypatch.setattr(server, "serve", lambda app, listening: apps.append(app))

    def call(*arguments: object) -> tuple[Result, list]:
        return CliRunner().invoke(main, ["serve", *map(str, arguments)]), apps

    return call


def policy(apps: list):
    (app,) = apps
    return next(each.kwargs["policy"] for each in app.user_middleware if "policy" in each.kwargs)


def test_it_listens_on_this_machine_only_by_default(kindling, trained):
    result, apps = kindling(trained.path, "--port", 0)
    assert result.exit_code == 0, result.output
    assert re.search(r"^serving trained, step 100, at http://127\.0\.0\.1:\d+ ", result.stderr)
    assert "warning" not in result.stderr
    assert policy(apps).hosts == ("localhost", "127.0.0.1", "[::1]")
    assert policy(apps).key is None


def test_opening_it_to_others_without_a_key_warns_once(kindling, trained):
    result, apps = kindling(trained.path, "--port", 0, "--host", "0.0.0.0")
    assert result.stderr.count("warning") == 1
    assert "--api-key" in result.stderr
    assert policy(apps).hosts is None


def test_with_a_key_there_is_no_warning(kindling, trained):
    result, apps = kindling(trained.path, "--port", 0, "--host", "0.0.0.0", "--api-key", "k")
    assert "warning" not in result.stderr
    assert policy(apps).key == "k"


def test_a_run_that_reads_images_is_served_and_says_where_neighbors_are_sought(kindling, seeing_run):
    result, apps = kindling(seeing_run.path, "--port", 0, "--max-waiting", 3)
    assert result.exit_code == 0, result.output
    assert re.search(r"^Neighbors are sought among all \d+ training images", result.stderr)
    assert re.search(r"^serving run, step 6, at (http://127\.0\.0\.1:\d+) \(API: \1/api\)$", result.stderr, re.M)
    assert apps[0].state.engine.capacity == 4


def test_of_a_fine_tuned_run_on_images_the_best_checkpoint_is_served(kindling, image_classifier, monkeypatch):
    wanted, load = [], api.load_task_model

    def noted(run, *, checkpoint, device):
        wanted.append(checkpoint)
        return load(run, checkpoint=checkpoint, device=device)

    monkeypatch.setattr(api, "load_task_model", noted)
    for arguments in ((), ("--checkpoint", "newest"), ("--checkpoint", "best")):
        result, _ = kindling(image_classifier.path, "--port", 0, *arguments)
        assert result.exit_code == 0, result.output
    assert wanted == ["best", "newest", "best"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "no.such.host.invalid"), "is not an address of this machine"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1"),
        (("--api-key", ""), "the API key is empty"),
        (("--checkpoint", "77"), "no checkpoint of step 77"),
        (("--max-concurrent", 0), "--max-concurrent"),
    ],
)
def test_invalid_options_are_reported_in_one_sentence(kindling, trained, arguments, words):
    result, apps = kindling(trained.path, "--port", 0, *arguments)
    assert result.exit_code == 2
    assert apps == []
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_named(kindling, trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result, _ = kindling(trained.path, "--port", port)
    assert result.exit_code == 2
    assert result.stderr == f"error: port {port} of 127.0.0.1 is in use by another program: choose another --port\n"


def test_without_the_extra_it_says_what_to_install(kindling, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result, _ = kindling(trained.path, "--port", 0)
    assert result.exit_code == 2
    assert 'pip install "kindling-lm[serve]"' in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_running_requests_finish_and_exits_cleanly(trained, number):
    command = [sys.executable, "-c", "from lm.cli.main import main; main()", "serve", str(trained.path), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stderr.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            body = {"prompt": "the", "max_tokens": 300, "stream": True, "stream_options": {"include_usage": True}}
            connection.request("POST", "/v1/completions", json.dumps(body))
            answer = connection.getresponse()
            answer.readline()
            process.send_signal(number)
            assert answer.read().endswith(b"data: [DONE]\n\n")
            connection.close()
            assert process.wait(120) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
