"""``kindling evaluate``: measure a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.command_line import FriendlyCommand
from lm.commands.options import checkpoint_option, json_option, run_argument

if TYPE_CHECKING:
    from lm.checkpoint import Checkpoint
    from lm.run_directory import Run


@click.command(cls=FriendlyCommand)
@run_argument
@click.option("--data", default="", help="Folder of token shards to evaluate on. Default: the run's own.")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Minimal pairs instead of the loss: a .jsonl, .csv or .tsv file, or a folder of them (BLiMP).",
)
@click.option(
    "--columns",
    nargs=2,
    default=("sentence_good", "sentence_bad"),
    show_default=True,
    help="The pairs' columns: the acceptable sentence, the other.",
)
@click.option(
    "--ties",
    type=click.Choice(["half", "first"]),
    default="half",
    show_default=True,
    help="What a pair of equally likely sentences scores; first: 1, as is usual and flattering.",
)
@checkpoint_option
@json_option
def evaluate(
    run: Path, data: str, pairs: Path | None, columns: tuple[str, str], ties: str, which: str, as_json: bool
) -> None:
    """Loss of RUN over the whole validation split, for each way it reads, in nats per token and bits per byte.

    Beside it stand floors: what the frequency of tokens, and bz2 -9, reach on the same text. With --pairs: how often
    it finds the acceptable one of two sentences likelier.
    """
    from lm.evaluate import evaluate as evaluate_run
    from lm.run_directory import open_run

    opened = open_run(run)
    if pairs is not None:
        _evaluate_pairs(opened, opened.checkpoint(which), pairs, columns, ties, as_json)
        return
    result = evaluate_run(opened, data, opened.checkpoint(which))
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "nats per token", "bits per byte", box=None, pad_edge=False)
    for losses, kind in ((result["validation"], ""), (result["floors"], " (floor)")):
        for name, loss in losses.items():
            nats = "" if loss["nats_per_token"] is None else f"{loss['nats_per_token']:.4f}"
            table.add_row(name + kind, nats, f"{loss['bits_per_byte']:.4f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"step {result['step']:,}; {result['validation_tokens']:,} tokens, {result['validation_bytes']:,} bytes of "
        f"{result['data']}; {result['protocol']}",
        markup=False,
    )


def _evaluate_pairs(
    run: Run, checkpoint: Checkpoint, path: Path, columns: tuple[str, str], ties: str, as_json: bool
) -> None:
    from lm import minimal_pairs
    from lm.run_directory import choose_device

    paradigms = minimal_pairs.read_pairs(path, columns)
    model = run.load_model(choose_device("auto"), checkpoint)
    results = minimal_pairs.evaluate_run(
        run, model, paradigms, ties=ties, progress=lambda text: click.echo(text, err=True)
    )
    if as_json:
        told = {name: {key: value.as_dict() for key, value in each.items()} for name, each in results.items()}
        click.echo(json.dumps({"ties": ties, "accuracy": told}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *results, box=None, pad_edge=False)
    for name in next(iter(results.values())):
        found = [each[name] for each in results.values()]
        table.add_row(name, *(f"{result.mean:.1%} ± {result.error:.1%}" for result in found))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    equal = ", ".join(f"{name} {each['all'].ties:,}" for name, each in results.items())
    console.print(
        f"share of pairs whose acceptable sentence is the likelier one, ± bootstrap error; temperature 1; ties score "
        f"{ties} (of {next(iter(results.values()))['all'].pairs:,}: {equal}); all: the mean over paradigms",
        markup=False,
    )
