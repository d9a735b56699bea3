"""The door: who may ask, from which page, and how much at once.

A page of another site that a person has open can send requests to this machine as well, and by a name of its own that
it lets point here (DNS rebinding) it could even read the answers. So a request must call the server by a name that it
has, and one that a page sends must come from our own page, or from one that was allowed.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_prep.errors import UserError
from lm.serve.engine import BusyError, StoppedError
from lm.serve.schema import ApiError

Result = TypeVar("Result")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
KEYED = ("/v1/", "/api/")
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
BODY_SECONDS = 60
# A client that is told "too large" before it has sent all of it sees a broken connection instead of the answer.
READ_AND_DROPPED = 64


@dataclass(frozen=True)
class Door:
    """Who is let in.

    Attributes:
        key: what ``Authorization: Bearer …`` must say; None: nothing.
        hosts: the names that a request may call the server by, without the port; None: any.
        origins: pages of other sites that may ask.
    """

    key: str | None = None
    hosts: tuple[str, ...] | None = LOCAL_NAMES
    origins: tuple[str, ...] = ()


class Guard:
    """An ASGI application around another, which is not called for what may not pass."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.door.hosts is not None and name.lower() not in self.door.hosts:
            raise ApiError(403, f'this server does not go by the name "{name}"', code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin.split("://")[-1] != host and origin not in self.door.origins:
            raise ApiError(403, f"pages of {origin} may not ask here: see --allow-origin", code="foreign_origin")
        if self.door.key is not None and path.startswith(KEYED):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self.door.key.encode()):
                raise ApiError(
                    401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
                )


def error_of(error: Exception) -> ApiError:
    """What a client is told about an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, "; ".join(str(error).splitlines()))
    if isinstance(error, BusyError):
        return ApiError(429, "the server has as many requests as it takes: try again soon", code="rate_limit_exceeded")
    if isinstance(error, StoppedError):
        return ApiError(503, "the server is going down")
    return ApiError(500, "the server failed at this request: its log says why")


def error_response(error: ApiError) -> JSONResponse:
    extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.body(), error.status, extra.get(error.status))


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises ApiError if it is longer than ``limit`` bytes, or takes more than a minute."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit * READ_AND_DROPPED:
                    break
                if size <= limit:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} seconds") from None
    if size > limit:
        raise ApiError(413, f"the request is larger than {limit:,} bytes", code="request_too_large")
    return bytes(body)


async def unless_gone(request: Request, wanted: Awaitable[Result]) -> Result:
    """Wait for something on behalf of a client; when the client goes away it is cancelled.

    Raises:
        ClientDisconnect: it did.
    """
    task, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
