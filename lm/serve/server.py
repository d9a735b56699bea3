"""Open a port, and serve an application on it until a signal arrives."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket

import uvicorn
from starlette.applications import Starlette

from data_prep.errors import UserError
from lm.serve.engine import Engine

WAITING_CONNECTIONS = 2048
# Requests that are still running this long after a signal are canceled.
SECONDS_TO_FINISH = 5


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free port. Raises UserError if it cannot be opened."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=WAITING_CONNECTIONS)
    except (socket.gaierror, UnicodeError):  # UnicodeError: no name of a computer can be spelled so
        raise UserError(f'"{host}" is not an address of this machine: use --host 127.0.0.1 or --host 0.0.0.0') from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use by another program: choose another --port") from None
        if error.errno == errno.EACCES:
            raise UserError(f"you do not have permission to use port {port}: choose a --port above 1023") from None
        raise UserError(f"cannot listen on {host}, port {port}: {(error.strerror or str(error)).lower()}") from None


class Server(uvicorn.Server):
    """uvicorn's server, which on shutdown stops the engine if running requests do not finish in time."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.get_running_loop().call_later(SECONDS_TO_FINISH, self._engine.stop)
        await super().shutdown(sockets)
        deadline.cancel()


def make_server(app: Starlette) -> Server:
    """A server that does not log requests, for an application of ``make_app``; ``run`` it on sockets of ``listen``."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=2 * SECONDS_TO_FINISH,  # for clients that do not read their answers
    )
    return Server(config, app.state.engine)


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; running requests then have ``SECONDS_TO_FINISH`` to finish."""
    server = make_server(app)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns about every client that disconnects
    # uvicorn raises the signal again when it has shut down; the process should still exit normally.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()
