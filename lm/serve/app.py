"""The application: which address answers what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from data_prep.errors import UserError
from lm.serve.engine import BusyError, Engine, FailedError, StoppedError
from lm.serve.guard import Door, Guard, error_of, error_response
from lm.serve.kindling_api import Own
from lm.serve.openai_api import OpenAI
from lm.serve.schema import ApiError
from lm.serve.service import Service

PAGE = Path(__file__).parent / "static"


def make_app(service: Service, door: Door) -> Starlette:
    """The application that serves a run to whom the door lets in; ``state.engine`` is its engine."""
    engine = Engine(service.make_writer, service.places)
    openai, own = OpenAI(service, engine), Own(service, engine)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.close()

    async def page(_: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    routes = [
        Route("/", page),
        Mount("/static", StaticFiles(directory=PAGE)),
        Route("/health", own.health),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
        Route("/v1/models", openai.models),
        Route("/v1/models/{name:path}", openai.model),
        Route("/api/fill", own.fill, methods=["POST"]),
        Route("/api/probabilities", own.probabilities, methods=["POST"]),
        Route("/api/run", own.run),
        Route("/api/metrics", own.metrics),
    ]
    middleware = [Middleware(Guard, door=door)]
    if door.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=door.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        middleware = [cors, *middleware]
    told = dict.fromkeys((ApiError, UserError, BusyError, StoppedError, FailedError), _tell)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            **told,
            HTTPException: _tell_http,
            ClientDisconnect: _tell_nobody,
            Exception: _tell,
        },
        lifespan=lifespan,
    )
    app.state.engine = engine
    return app


async def _tell(_: Request, error: Exception) -> Response:
    return error_response(error_of(error))


async def _tell_http(request: Request, error: Exception) -> Response:
    """No such address, or not by this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _tell_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=400)
