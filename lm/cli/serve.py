"""``kindling serve``: a run over HTTP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors import UserError
from lm.cli.options import checkpoint_option, compile_option, device_option, is_given, run_argument

if TYPE_CHECKING:
    from lm.data.image_files import Pixels
    from lm.runs.directory import Run
    from lm.serve.image_service import ImageService
    from lm.serve.schema import Limits
    from lm.serve.service import Service

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command(
    cls=FriendlyCommand,
    short_help="Serve a model: OpenAI's API and a web page.",
    sections=(
        Section("Address", "host port api_key origins"),
        Section("Limits", "max_concurrent max_waiting max_tokens"),
        Section("Model", "which device compiled"),
    ),
)
@run_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all addresses.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0: any free one."
)
@click.option(
    "--api-key",
    envvar="KINDLING_API_KEY",
    show_envvar=True,
    help="Key that requests must send as Authorization: Bearer KEY. Default: none.",
)
@click.option(
    "--max-concurrent",
    default=16,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="Texts generated at the same time; each takes memory for its context.",
)
@click.option(
    "--max-waiting",
    default=256,
    show_default=True,
    type=click.IntRange(0),
    help="Texts that may wait for their turn; further requests are refused (HTTP status 429).",
)
@click.option(
    "--max-tokens",
    default=2048,
    show_default=True,
    type=click.IntRange(1),
    help="The most tokens that a request may ask for, per text.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Another website whose pages may send requests, such as http://localhost:3000; may be repeated.",
)
@compile_option
@device_option
@checkpoint_option
def serve(
    run: Path,
    host: str,
    port: int,
    api_key: str | None,
    max_concurrent: int,
    max_waiting: int,
    max_tokens: int,
    origins: tuple[str, ...],
    compiled: bool,
    device: str,
    which: str,
) -> None:
    """Serve RUN over HTTP, with OpenAI's API (completions, chat, models) and a web page. Ctrl-C stops it.

    \b
    kindling serve runs/mine
    \f
    The page generates text, fills masks, shows token probabilities, and follows the run while it trains.

    Of a run that reads images, the page shows for a picture its nearest neighbors among the training images, where the
    model attends, and the class if the run is fine-tuned for classes; its best checkpoint is then the default.
    """
    from lm.config.recipes import require_language_model, require_no_text_options, run_config

    config = run_config(run)
    if config.reads_images:
        of_texts = {"max_concurrent": "max_concurrent", "max_tokens": "max_tokens", "compile": "compiled"}
        require_no_text_options({option: is_given(name) for option, name in of_texts.items()})
        if config.has_task_head and not is_given("which"):
            which = "best"
    else:
        require_language_model(run, config)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError('serving needs packages that are not installed: pip install "kindling-lm[serve]"') from None
    from lm.runs.directory import open_run
    from lm.serve.app import make_app
    from lm.serve.guard import LOCAL_NAMES, AccessPolicy
    from lm.serve.image_service import BODY_BYTES
    from lm.serve.schema import Limits
    from lm.serve.server import listen, serve

    if api_key == "":
        raise UserError("the API key is empty: set one, or remove --api-key and KINDLING_API_KEY")
    opened = open_run(run)
    limits = Limits(concurrent=max_concurrent, waiting=max_waiting, new_tokens=max_tokens)
    with listen(host, port) as listening:
        service: Service | ImageService
        if config.reads_images:
            service = image_service(opened, which, device, replace(limits, body_bytes=BODY_BYTES))
            click.echo(service.bank_note, err=True)
        else:
            service = text_service(opened, which, device, limits, compiled)
        local = host in LOCAL
        if not local and api_key is None:
            click.echo(f"warning: anyone who can reach {host} can use this model; --api-key restricts access", err=True)
        app = make_app(service, AccessPolicy(api_key, LOCAL_NAMES if local else None, origins))
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listening.getsockname()[1]}"
        api = f"{url}/{'api' if config.reads_images else 'v1'}"
        click.echo(f"serving {service.name}, step {service.checkpoint.step:,}, at {url} (API: {api})", err=True)
        serve(app, listening)


def text_service(run: Run, which: str, device: str, limits: Limits, compiled: bool) -> Service:
    """What serves a language model."""
    from lm.model.device import choose_device
    from lm.serve.service import Service

    checkpoint = run.checkpoint(which)
    model = run.load_model(choose_device(device), checkpoint)
    return Service.open(run, checkpoint, model, limits, compiled=compiled)


def image_service(run: Run, which: str, device: str, limits: Limits) -> ImageService:
    """What serves a run that reads images."""
    from lm import api
    from lm.finetuning.predict import predict_images
    from lm.inference.image_model import ImageEncoder
    from lm.model.image_transformer import ImageTransformer
    from lm.serve.image_service import ImageService

    if run.config.has_task_head:
        predictor = api.load_task_model(run, checkpoint=which, device=device)
        trunk = predictor.model.trunk
        assert isinstance(trunk, ImageTransformer)
        encoder = ImageEncoder(trunk, run.image_format, run.config)

        def classify(pixels: Pixels) -> dict[str, Any]:
            return next(predict_images(predictor, [pixels]))

        return ImageService.open(run, predictor.saved, encoder, limits, classify)
    model = api.load_image_model(run, checkpoint=which, device=device)
    return ImageService.open(run, model.saved, model, limits)
