"""``/api`` of a run that reads images: its features, and what it makes of a picture; the web page uses it."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lm.serve.engine import Engine
from lm.serve.guard import read_json, unless_disconnected
from lm.serve.image_service import MOST_NEIGHBORS, ImageService
from lm.serve.schema import Fields

DEEPEST_LAYER = 1 << 16


@dataclass(frozen=True)
class ImageAPI:
    """The endpoints that take an ``image``: the bytes of a file, in base64."""

    service: ImageService
    engine: Engine

    async def embed(self, request: Request) -> Response:
        """The feature of ``image``, as ``kindling embed`` writes it, of ``layer``, scaled by ``normalize``."""
        fields = Fields(await read_json(request, self.service.limits.body_bytes))
        layer, normalize = fields.integer("layer", -1, -1, DEEPEST_LAYER), fields.flag("normalize")
        image = await _image(fields)
        work = self.engine.compute(self.service.embed(image, layer, normalize=normalize))
        (vector,) = await unless_disconnected(request, work)
        return JSONResponse({"vector": vector})

    async def look(self, request: Request) -> Response:
        """What the model reads of ``image``, where it attends, its nearest ``neighbors`` and its class."""
        fields = Fields(await read_json(request, self.service.limits.body_bytes))
        neighbors = fields.integer("neighbors", 12, 0, MOST_NEIGHBORS)
        image = await _image(fields)
        (found,) = await unless_disconnected(request, self.engine.compute(self.service.look(image, neighbors)))
        return JSONResponse(found)


async def _image(fields: Fields) -> bytes:
    """The last field of a request, the bytes of an image file. Raises ApiError as ``Fields.done``."""
    text = fields.text("image")
    try:
        data = await asyncio.to_thread(base64.b64decode, text, validate=True)
    except ValueError:
        fields.problem("image", "must be the bytes of an image file in base64")
    fields.done()
    return data
