"""Serve a run over HTTP, with OpenAI's API and a web page: ``server.serve(app.make_app(service, policy), socket)``.

The web packages are an extra, so ``app``, ``guard`` and ``server``, which need them, are imported where they are used.
"""

from lm.serve.engine import Engine
from lm.serve.image_service import ImageService
from lm.serve.schema import ApiError, Limits
from lm.serve.service import Service

__all__ = ["ApiError", "Engine", "ImageService", "Limits", "Service"]
