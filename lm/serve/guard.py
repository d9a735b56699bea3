"""Access control: which clients and web pages may send requests, and how large these may be.

Any website open in a browser can send requests to this machine, and by pointing a domain of its own here (DNS
rebinding) it could even read the answers. So the Host header must be one of the server's own names, and requests from a
web page must come from the server's page or from an allowed origin.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm.serve.schema import ApiError, parse_json

Result = TypeVar("Result")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
KEY_REQUIRED = ("/v1/", "/api/")
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
BODY_SECONDS = 60
# Read, in multiples of the limit, before refusing: a client that cannot send its whole body would not see the answer.
DISCARDED_BODIES = 64


@dataclass(frozen=True)
class AccessPolicy:
    """Which clients are admitted.

    Attributes:
        key: the key required in ``Authorization: Bearer …``; None: no key.
        hosts: the names of the server that a Host header may have, without the port; None: any.
        origins: other websites whose pages may send requests.
    """

    key: str | None = None
    hosts: tuple[str, ...] | None = LOCAL_NAMES
    origins: tuple[str, ...] = ()


class Guard:
    """An ASGI application that wraps another and answers requests that the policy forbids itself."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self.app, self.policy = app, policy

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
        if self.policy.hosts is not None and name.lower() not in self.policy.hosts:
            raise ApiError(403, f'"{name}" is not a name of this server', code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin.split("://")[-1] != host and origin not in self.policy.origins:
            raise ApiError(403, f"pages of {origin} may not use this server: see --allow-origin", code="foreign_origin")
        if self.policy.key is not None and path.startswith(KEY_REQUIRED):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self.policy.key.encode()):
                message = "the API key is missing or wrong: send Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP answer for an error, in OpenAI's format."""
    extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.body(), error.status, extra.get(error.status))


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The request's body, a JSON object. Raises ApiError, also if it exceeds ``limit`` bytes or takes over a minute."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit * DISCARDED_BODIES:
                    break
                if size <= limit:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} seconds") from None
    if size > limit:
        raise ApiError(413, f"the request is larger than {limit:,} bytes", code="request_too_large")
    return parse_json(bytes(body))


async def unless_disconnected(request: Request, wanted: Awaitable[Result]) -> Result:
    """Await something on behalf of a client, and cancel it when the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    task, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
