from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.errors import UserError
from lm.serve import server
from lm.serve.schema import Limits

ENDLESS = {"temperature": 0, "repetition_penalty": 0.5}  # repeats itself endlessly


def test_a_port_can_be_opened_once_and_port_0_is_a_free_one():
    with server.listen("127.0.0.1", 0) as first, server.listen("127.0.0.1", 0) as second:
        host, port = first.getsockname()
        assert (host, port > 0) == ("127.0.0.1", True)
        assert second.getsockname()[1] != port
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use"):
            server.listen("127.0.0.1", port)
    server.listen("127.0.0.1", port).close()


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1, port 0"):
        server.listen("192.0.2.1", 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_requests_that_do_not_finish_in_time_get_an_error(trained, serving, monkeypatch, streamed, caplog):
    monkeypatch.setattr(server, "SECONDS_TO_FINISH", 0.1)
    limits = Limits(new_tokens=100_000)
    with serving(trained, limits=limits) as served, ThreadPoolExecutor() as threads:
        asked = {
            "prompt": "the",
            "max_tokens": 100_000,
            "stream": streamed,
            **ENDLESS,
        }
        answer = threads.submit(served.ask, "/v1/completions", asked)
        while not served.writer.busy:
            time.sleep(0.001)
        served.stop()
        ended = answer.result(120)
    assert ended.status == (200 if streamed else 503)
    error = json.loads(ended.body.decode().split("\n\n")[-2].removeprefix("data: ") if streamed else ended.body)[
        "error"
    ]
    assert error["message"] == "the server is shutting down"
    assert "Traceback" not in caplog.text
