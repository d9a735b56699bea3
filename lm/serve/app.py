"""The web application and its routes."""

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
from lm.serve.answers import error_of
from lm.serve.engine import BusyError, Engine, FailedError, StoppedError
from lm.serve.guard import AccessPolicy, Guard, error_response
from lm.serve.kindling_api import KindlingAPI
from lm.serve.openai_api import OpenAIAPI
from lm.serve.schema import ApiError
from lm.serve.service import Service

PAGE = Path(__file__).parent / "static"


def make_app(service: Service, policy: AccessPolicy) -> Starlette:
    """The application that serves a run to the clients that ``policy`` admits; ``state.engine`` is its engine."""
    engine = Engine(service.make_writer, service.places)
    openai, kindling = OpenAIAPI(service, engine), KindlingAPI(service, engine)

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
        Route("/health", kindling.health),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
        Route("/v1/models", openai.models),
        Route("/v1/models/{name:path}", openai.model),
        Route("/api/fill", kindling.fill, methods=["POST"]),
        Route("/api/probabilities", kindling.probabilities, methods=["POST"]),
        Route("/api/run", kindling.run),
        Route("/api/metrics", kindling.metrics),
    ]
    middleware = [Middleware(Guard, policy=policy)]
    if policy.origins:
        methods, headers = ["GET", "POST"], ["Authorization", "Content-Type"]
        cors = Middleware(CORSMiddleware, allow_origins=policy.origins, allow_methods=methods, allow_headers=headers)
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            **dict.fromkeys((ApiError, UserError, BusyError, StoppedError, FailedError, Exception), _answer_error),
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_disconnected,
        },
        lifespan=lifespan,
    )
    app.state.engine = engine
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    return error_response(error_of(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _answer_disconnected(_: Request, __: Exception) -> Response:
    return Response(status_code=400)
