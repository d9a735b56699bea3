"""``kindling serve``: a run over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import UserError
from lm.cli.options import checkpoint_option, compile_option, device_option, run_argument

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command(cls=FriendlyCommand, short_help="Serve a model: OpenAI's API and a web page.")
@run_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all addresses.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
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

    The page generates text, fills masks, shows token probabilities, and follows the run while it trains.
    """
    from lm.config.recipes import require_language_model, run_config

    require_language_model(run, run_config(run))
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError('serving needs packages that are not installed: pip install "kindling-lm[serve]"') from None
    from lm.model.device import choose_device
    from lm.runs.directory import open_run
    from lm.serve.app import make_app
    from lm.serve.guard import LOCAL_NAMES, AccessPolicy
    from lm.serve.schema import Limits
    from lm.serve.server import listen, serve
    from lm.serve.service import Service

    if api_key == "":
        raise UserError("the API key is empty: set one, or remove --api-key and KINDLING_API_KEY")
    opened = open_run(run)
    limits = Limits(concurrent=max_concurrent, waiting=max_waiting, new_tokens=max_tokens)
    with listen(host, port) as listening:
        checkpoint = opened.checkpoint(which)
        model = opened.load_model(choose_device(device), checkpoint)
        service = Service.open(opened, checkpoint, model, limits, compiled=compiled)
        local = host in LOCAL
        if not local and api_key is None:
            click.echo(f"warning: anyone who can reach {host} can use this model; --api-key restricts access", err=True)
        app = make_app(service, AccessPolicy(api_key, LOCAL_NAMES if local else None, origins))
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listening.getsockname()[1]}"
        click.echo(f"serving {service.name}, step {checkpoint.step:,}, at {url} (API: {url}/v1)", err=True)
        serve(app, listening)
