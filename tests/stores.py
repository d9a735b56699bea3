"""Stores for tests: folders behind HTTP and S3 on this machine, and a gate in front of them that can be shut."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LOCAL = "127.0.0.1"
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class _Handler(SimpleHTTPRequestHandler):
    """Files of a folder, whole or a range of their bytes, which the standard library's handler does not know."""

    protocol_version = "HTTP/1.1"  # so that connections are kept

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.store.ranges:  # type: ignore[attr-defined]
            first, last = map(int, asked.groups())
            if first >= len(content):
                self.send_error(416)
                return
            content, status = content[first : last + 1], 206
        self.server.store.asked.append((path.name, len(content)))  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Gate:
    """A port that passes what comes to another one, unless it is shut: it then refuses, or says nothing."""

    def __init__(self, target: int) -> None:
        self._target, self._threads, self._open = target, [], set()
        self._lock, self.state = threading.Lock(), "open"
        self._listening = socket.create_server((LOCAL, 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, state: str) -> None:
        """ "open", "refusing" or "stalling"; connections from before end, as in a restart."""
        with self._lock:
            self.state = state
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        self.set("refusing")
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                if self.state == "refusing":
                    client.close()
                    continue
                self._open.add(client)
                if self.state == "stalling":
                    continue
                server = socket.create_connection((LOCAL, self._target))
                self._open.add(server)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(1 << 16):
                target.sendall(block)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Store:
    """A running store.

    Attributes:
        url: where its dataset is.
        gate: in front of it.
    """

    def __init__(self, url: str, port: int) -> None:
        self.gate = _Gate(port)
        self.url = url.replace(f":{port}/", f":{self.gate.port}/")


class HttpStore(Store):
    """A folder behind HTTP, which sends whole files unless ``ranges``.

    ``asked`` has the name and the number of bytes of each answer.
    """

    def __init__(self, folder: Path) -> None:
        self._server = ThreadingHTTPServer((LOCAL, 0), partial(_Handler, directory=folder))
        self._server.daemon_threads = True
        self.asked: list[tuple[str, int]] = []
        self.ranges = True
        self._server.store = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        port = self._server.server_address[1]
        super().__init__(f"http://{LOCAL}:{port}/data", port)

    def close(self) -> None:
        self.gate.close()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def http_store(folder: Path) -> Iterator[HttpStore]:
    """The folder ``data`` in ``folder``, behind HTTP."""
    store = HttpStore(folder)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def s3_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The files of ``folder`` in ``s3://bucket/data``, with the variables set that lead there."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(ip_address=LOCAL, port=0, verbose=False)
    running.start()
    _, port = running.get_host_and_port()
    store = Store("s3://bucket/data", port)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{LOCAL}:{store.gate.port}"}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    client = boto3.client("s3", endpoint_url=f"http://{LOCAL}:{port}")
    client.create_bucket(Bucket="bucket")
    for path in folder.iterdir():
        client.put_object(Bucket="bucket", Key=f"data/{path.name}", Body=path.read_bytes())
    s3fs.S3FileSystem.clear_instance_cache()  # it remembers the endpoint of an earlier test
    try:
        yield store
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        store.gate.close()
        running.stop()
