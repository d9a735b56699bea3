"""``kindling serve``: a run over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import UserError
from lm.cli.options import checkpoint_option, compile_option, device_option, run_argument

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command(cls=FriendlyCommand)
@run_argument
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of this machine's."
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option(
    "--api-key",
    envvar="KINDLING_API_KEY",
    show_envvar=True,
    help="What requests must send as Authorization: Bearer KEY. Default: nothing.",
)
@click.option(
    "--max-concurrent",
    default=16,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="Texts that are written at the same time; each takes memory for its context.",
)
@click.option(
    "--max-waiting",
    default=256,
    show_default=True,
    type=click.IntRange(0),
    help="Texts that may wait for their turn; more are refused (HTTP status 429).",
)
@click.option(
    "--max-tokens",
    default=2048,
    show_default=True,
    type=click.IntRange(1),
    help="Tokens that a request may ask for, each of its texts.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of another site ask, such as http://localhost:3000; may be repeated.",
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
    """Serve RUN over HTTP: OpenAI's API (completions, chat, models), and a page to write, fill and watch it train.

    Ctrl-C ends it.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError('serving needs packages that are not here: pip install "kindling-lm[serve]"') from None
    from lm.model.device import choose_device
    from lm.runs.directory import open_run
    from lm.serve.app import make_app
    from lm.serve.guard import LOCAL_NAMES, Door
    from lm.serve.schema import Limits
    from lm.serve.server import listen, serve
    from lm.serve.service import Service

    if api_key == "":
        raise UserError("the API key is empty: give one, or leave --api-key and KINDLING_API_KEY away")
    opened = open_run(run)
    checkpoint = opened.checkpoint(which)
    limits = Limits(concurrent=max_concurrent, waiting=max_waiting, new_tokens=max_tokens)
    with listen(host, port) as listening:
        model = opened.load_model(choose_device(device), checkpoint)
        service = Service.open(opened, checkpoint, model, limits, compiled=compiled)
        local = host in LOCAL
        if not local and api_key is None:
            click.echo(f"warning: whoever reaches {host} can use this model: --api-key keeps others out", err=True)
        app = make_app(service, Door(api_key, LOCAL_NAMES if local else None, origins))
        name = f"[{host}]" if ":" in host else host
        where = f"http://{name}:{listening.getsockname()[1]}"
        click.echo(f"{service.name}, step {checkpoint.step:,}, at {where} (API: {where}/v1); Ctrl-C ends it", err=True)
        serve(app, listening)
