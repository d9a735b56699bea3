"""``kindling sample``: write with a trained model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.command_line import FriendlyCommand
from data_prep.errors import UserError
from lm.commands.options import checkpoint_option, device_option, json_option, run_argument

if TYPE_CHECKING:
    from lm.model import Transformer
    from lm.run_directory import Run
    from lm.sampling import Sampling


@click.command(cls=FriendlyCommand)
@run_argument
@click.option("--prompt", "prompts", multiple=True, help='Text to continue; may be repeated. "" begins a new text.')
@click.option(
    "--fill", "fills", multiple=True, help="Text in which each [MASK] is filled with one token; may be repeated."
)
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    help="Below 1: safer, above: wilder, 0: always the likeliest token.",
)
@click.option("--top-k", default=0, show_default=True, help="Draw from the k likeliest tokens; 0: from all.")
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that together reach this probability.",
)
@click.option(
    "--min-p",
    default=0.0,
    show_default=True,
    help="Leave out tokens less than this many times as likely as the likeliest.",
)
@click.option("--max-new-tokens", default=200, show_default=True, help="Tokens to write at most.")
@click.option("--seed", default=0, show_default=True, help="The same seed writes the same text.")
@device_option
@checkpoint_option
@json_option
def sample(
    run: Path, prompts: tuple[str, ...], fills: tuple[str, ...], device: str, which: str, as_json: bool, **sampling: Any
) -> None:
    """Write with the model of RUN: continue prompts, fill masks. The text alone goes to stdout."""
    from lm.run_directory import choose_device, open_run
    from lm.sampling import Sampling

    settings = Sampling(**sampling)
    if problems := settings.problems():
        raise UserError("\n".join(problems))
    if not prompts and not fills:
        raise UserError('nothing to do: give --prompt "Once upon a time", or --fill "The [MASK] sat on the mat."')
    opened = open_run(run)
    _check_readouts(opened, prompts, fills)
    model = opened.load_model(choose_device(device), opened.checkpoint(which))
    for number, prompt in enumerate(prompts):
        if number and not as_json:
            click.echo()
        _continue(opened, model, prompt, settings, as_json)
    for text in fills:
        _fill(opened, model, text, as_json)


def _check_readouts(run: Run, prompts: tuple[str, ...], fills: tuple[str, ...]) -> None:
    from lm.objectives import READOUTS

    objective = run.config.objective.objective
    if prompts and "next_token" not in READOUTS[objective]:
        raise UserError(
            f"{run.path} was trained with {objective} only: it can fill masks (--fill), but not continue a prompt"
        )
    if fills and READOUTS[objective][-1] == "next_token":
        raise UserError(
            f"{run.path} was trained with {objective} only: it can continue a prompt (--prompt), but not fill masks"
        )


def _continue(run: Run, model: Transformer, prompt: str, sampling: Sampling, as_json: bool) -> None:
    from lm.generator import stream

    events = stream(model, run.tokenizer, prompt, sampling, run.config.data.context_length)
    pieces = (event.text for event in events)
    if as_json:
        click.echo(json.dumps({"prompt": prompt, "continuation": "".join(pieces)}, ensure_ascii=False))
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _fill(run: Run, model: Transformer, text: str, as_json: bool) -> None:
    from lm.infill import fill_masks
    from lm.objectives import READOUTS

    readout = READOUTS[run.config.objective.objective][-1]
    filled = fill_masks(model, run.tokenizer, text, readout, run.config.data.context_length)
    if as_json:
        told = [[{"token": t, "probability": round(p, 6)} for t, p in mask] for mask in filled.candidates]
        click.echo(json.dumps({"fill": text, "filled": filled.text, "candidates": told}, ensure_ascii=False))
        return
    click.echo(filled.text)
    for candidates in filled.candidates:
        click.echo(
            "    " + "  ".join(f"{token.strip()} {probability:.0%}" for token, probability in candidates), err=True
        )
