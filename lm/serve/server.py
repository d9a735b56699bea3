"""Take a port, and serve an application on it until a signal comes."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette

from data_prep.errors import UserError
from lm.serve.engine import Engine

WAITING_CONNECTIONS = 2048
# What is still being answered when a signal comes is let go of after this.
SECONDS_TO_FINISH = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. UserError: it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=WAITING_CONNECTIONS)
    except socket.gaierror:
        raise UserError(f'"{host}" is no address of this machine: say --host 127.0.0.1, or --host 0.0.0.0') from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken by another program: choose another --port") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs rights that you do not have: choose a --port above 1023") from None
        raise UserError(f"cannot listen on {host}, port {port}: {(error.strerror or str(error)).lower()}") from None


class Server(uvicorn.Server):
    """uvicorn's, which gives the engine up when what is being answered at its end does not finish."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        giving_up = asyncio.get_running_loop().call_later(SECONDS_TO_FINISH, self._engine.stop)
        await super().shutdown(sockets)
        giving_up.cancel()


def make_server(app: Starlette) -> Server:
    """A server without a log of each request; ``run`` it on sockets of ``listen``."""
    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=2 * SECONDS_TO_FINISH,  # for clients that do not read what they are told
        ),
        app.state.engine,
    )


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; what is being answered then has some seconds to finish."""
    server = make_server(app)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that hung up
    # Having ended, uvicorn raises the signal again; leaving is then no failure.
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()


def _ignore(*_: Any) -> None:
    pass
