"""Which requests are admitted, and how malformed ones are refused."""

from __future__ import annotations

import socket

import openai
import pytest

from lm.serve.guard import AccessPolicy

GREEDY = {"prompt": "the", "max_tokens": 2}


@pytest.fixture(scope="module")
def kept(trained, serving):
    """A server with a key and any name, which admits the pages of one other site."""
    with serving(trained, AccessPolicy(key="sésame", hosts=None, origins=("https://friend.example",))) as served:
        yield served


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "LOCALHOST", "[::1]:8000"])
def test_a_local_server_answers_to_local_names(served, host):
    assert served.ask("/health", headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "", "[::2]", "10.0.0.1:8000"])
def test_a_local_server_answers_to_no_other_name(served, host):
    for path in ("/", "/api/run", "/static/app.js"):
        answer = served.ask(path, headers={"Host": host})
        assert (answer.status, answer.error["code"]) == (403, "unknown_host")


def test_only_its_own_page_may_send_requests(served):
    def ask(origin: str):
        return served.ask("/v1/completions", GREEDY, {"Origin": origin, "Host": f"localhost:{served.port}"})

    assert ask(f"http://localhost:{served.port}").status == 200
    for origin in (
        "null",
        "https://evil.example",
        "http://localhost:1",
        f"http://localhost:{served.port}.evil.example",
    ):
        answer = ask(origin)
        assert (answer.status, answer.error["code"]) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers


def test_allowed_pages_may_send_requests_and_read_answers(kept):
    headers = {"Origin": "https://friend.example", "Authorization": "Bearer sésame".encode().decode("latin-1")}
    answer = kept.ask("/v1/completions", GREEDY, headers)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    asking = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    asking["Access-Control-Request-Headers"] = "authorization,content-type"
    assert kept.ask("/v1/completions", headers=asking, method="OPTIONS").status == 200
    assert kept.ask("/v1/completions", GREEDY, headers | {"Origin": "https://evil.example"}).status == 403


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", "sesame", "Basic sésame", "Bearer sésam"])
def test_nothing_is_revealed_without_the_key(kept, given):
    headers = {} if given is None else {"Authorization": given.encode().decode("latin-1")}
    for path, body in (("/v1/models", None), ("/api/run", None), ("/api/metrics", None), ("/v1/completions", GREEDY)):
        answer = kept.ask(path, body, headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert kept.ask("/", headers=headers).status == 200  # the page itself reveals nothing about the run


def test_openais_client_is_admitted_with_its_key_and_gets_an_error_without(trained, serving):
    with serving(trained, AccessPolicy(key="sesame")) as served:
        url = f"{served.url}/v1"
        with openai.OpenAI(base_url=url, api_key="sesame", max_retries=0) as client:
            assert client.completions.create(model="trained", **GREEDY).choices
        with (
            openai.OpenAI(base_url=url, api_key="guess", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="missing or wrong"),
        ):
            client.models.list()


def test_every_answer_forbids_what_the_page_does_not_need(served):
    for answer in (served.ask("/"), served.ask("/health"), served.ask("/nothing"), served.ask("/static/app.js")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http:" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers


def test_a_body_that_is_too_large_is_refused_with_an_answer(served):
    limit = served.service.limits.body_bytes
    answer = served.ask("/v1/completions", b'{"prompt": "' + b"a" * limit + b'"}')
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    answer = served.ask("/v1/completions", b'{"prompt": "' + b"a" * (limit - 20) + b'"}')
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    for path in ("/api/probabilities", "/api/fill"):
        answer = served.ask(path, b'{"text": "[MASK]' + b"a" * (limit - 30) + b'"}')
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


def test_a_slow_client_delays_no_other(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        assert served.ask("/health").json["requests"] == 0
        assert served.ask("/v1/completions", GREEDY).status == 200
