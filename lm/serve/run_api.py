"""What is answered about any served run: the model, its metrics, and the state of the server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lm.runs.directory import METRICS
from lm.serve.engine import Engine
from lm.serve.image_service import ImageService
from lm.serve.metrics_tail import read_tail
from lm.serve.schema import ApiError
from lm.serve.service import Service


@dataclass(frozen=True)
class RunAPI:
    """``/api/run``, ``/api/metrics``, ``/health``, and OpenAI's list of models."""

    service: Service | ImageService
    engine: Engine

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.service.name:
            raise ApiError(404, f'there is no model "{name}", only "{self.service.name}"', code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, object]:
        created = int((self.service.checkpoint.path / "state.json").stat().st_mtime)
        return {"id": self.service.name, "object": "model", "created": created, "owned_by": "kindling"}

    async def run(self, _: Request) -> Response:
        """The model, and the settings of its run."""
        return JSONResponse(await asyncio.to_thread(self.service.about))  # the first one opens the run's data

    async def metrics(self, request: Request) -> Response:
        """The lines of metrics.jsonl from byte ``from`` of ``file`` on; both come from an earlier answer."""
        start = request.query_params.get("from", "0")
        if not (start.isascii() and start.isdecimal() and len(start) < 16):
            raise ApiError(400, '"from" must be the "next" of an earlier answer', param="from")
        path, file = self.service.run.path / METRICS, request.query_params.get("file", "")
        return JSONResponse(await asyncio.to_thread(read_tail, path, file, int(start)))

    async def health(self, _: Request) -> Response:
        """How many requests are active or waiting, and how many may be."""
        return JSONResponse({"status": "ok", "requests": self.engine.in_use, "places": self.engine.capacity})
