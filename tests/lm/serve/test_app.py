"""Paths, methods and bodies that the application does not know."""

from __future__ import annotations

import random
import socket


def test_unknown_paths_and_methods_get_errors_in_the_same_format(served):
    assert served.ask("/v1/embeddings", {}).error["message"] == "POST /v1/embeddings: not found"
    answer = served.ask("/v1/completions")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert served.ask("/static/../index.html").status == 404
    assert served.ask("/static/%2e%2e/%2e%2e/cli.py").status == 404


def test_noise_is_answered_with_4xx_and_the_server_lives(served):
    draw = random.Random(0)
    pieces = [b'{"', b'prompt"', b":", b'"a"', b"[", b"]", b"}", b"1e999", b"\\u0000", b"\xff", b"null", b",", b"-"]
    for _ in range(100):
        path = draw.choice(["/v1/completions", "/v1/chat/completions", "/api/fill", "/api/probabilities"])
        answer = served.ask(path, b"".join(draw.choices(pieces, k=draw.randrange(12))))
        assert 400 <= answer.status < 500, answer
        assert answer.error["message"]
    for noise in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=120) as connection:
            connection.sendall(noise)
            assert connection.recv(100).startswith(b"HTTP/1.1 40")
    assert served.ask("/health").status == 200
