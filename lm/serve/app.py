"""The web application and its routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
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
from lm.serve.image_api import ImageAPI
from lm.serve.image_service import ImageService
from lm.serve.kindling_api import KindlingAPI
from lm.serve.openai_api import OpenAIAPI
from lm.serve.run_api import RunAPI
from lm.serve.schema import ApiError
from lm.serve.service import Service

PAGE = Path(__file__).parent / "static"
OF_TEXT = ("/v1/completions", "/v1/chat/completions", "/api/fill", "/api/probabilities")
OF_IMAGES = ("/api/embed", "/api/image")

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service | ImageService, policy: AccessPolicy) -> Starlette:
    """The application that serves a run to the clients that ``policy`` admits; ``state.engine`` is its engine."""
    engine = Engine(service.make_writer, service.places)
    of_run = RunAPI(service, engine)

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
        Route("/health", of_run.health),
        Route("/v1/models", of_run.models),
        Route("/v1/models/{name:path}", of_run.model),
        Route("/api/run", of_run.run),
        Route("/api/metrics", of_run.metrics),
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in _endpoints(service, engine).items()),
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


def _endpoints(service: Service | ImageService, engine: Engine) -> dict[str, Endpoint]:
    """What computes with the model, by path; the paths of the other kind of run are refused in a sentence."""
    if isinstance(service, ImageService):
        images = ImageAPI(service, engine)
        refuse = _refusing(f"{service.name} reads images, not text: use {' or '.join(OF_IMAGES)}")
        return {**dict.fromkeys(OF_TEXT, refuse), "/api/embed": images.embed, "/api/image": images.look}
    openai, kindling = OpenAIAPI(service, engine), KindlingAPI(service, engine)
    return {
        **dict.fromkeys(OF_IMAGES, _refusing(f"{service.name} reads text, not images")),
        "/v1/completions": openai.completions,
        "/v1/chat/completions": openai.chat_completions,
        "/api/fill": kindling.fill,
        "/api/probabilities": kindling.probabilities,
    }


def _refusing(sentence: str) -> Endpoint:
    async def refuse(_: Request) -> Response:
        raise ApiError(400, sentence, code="unsupported_input")

    return refuse


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
