"""``kindling evaluate``: measure a trained model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import UserError
from lm.cli.options import checkpoint_option, columns_of, columns_options, json_option, reading_options, run_argument

if TYPE_CHECKING:
    from lm.data.examples import Columns
    from lm.evaluation.bootstrap import Accuracy
    from lm.inference.embedding import Reading
    from lm.runs.checkpoint import Checkpoint
    from lm.runs.directory import Run


@click.command(cls=FriendlyCommand)
@run_argument
@click.option("--data", default="", help="Folder of token shards to evaluate on. Default: the run's own.")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Minimal pairs instead of the loss: a .jsonl, .csv, .tsv or .parquet file, or a folder of them (BLiMP).",
)
@click.option(
    "--text",
    "source",
    help="Any text instead of the validation split: a file, a folder, a pattern, whatever data preparation reads.",
)
@click.option("--text-field", default="text", show_default=True, help="--text: the field of records with the text.")
@click.option(
    "--stride",
    default=0,
    show_default=True,
    help="--text: tokens of a window that count, the others being seen only; 0: all, windows side by side.",
)
@click.option(
    "--choices",
    help="Questions with answers to choose from instead of the loss: .jsonl, .csv, .tsv, .parquet or hf:NAME[:SPLIT].",
)
@click.option(
    "--similarity",
    help="Pairs of texts with how alike they are: the rank correlation of that with the cosine of their embeddings.",
)
@columns_options("text", "text_pair", "choices", "label")
@reading_options
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
    run: Path,
    data: str,
    pairs: Path | None,
    source: str | None,
    text_field: str,
    stride: int,
    choices: str | None,
    similarity: str | None,
    reads: str | None,
    pooling: str | None,
    layer: int,
    columns: tuple[str, str],
    ties: str,
    which: str,
    as_json: bool,
    **task_columns: str | None,
) -> None:
    """Loss of RUN over the whole validation split, for each way it reads, in nats per token and bits per byte.

    Beside it stand floors: what the frequency of tokens, and bz2 -9, reach on the same text. With --text: the same of
    any text. With --pairs: how often it finds the acceptable one of two sentences likelier. With --choices: how often
    the right answer to a question is the likeliest. With --similarity: whether its embeddings rank pairs of texts as
    people do.
    """
    from lm.evaluation.validation_loss import evaluate as evaluate_run
    from lm.inference.embedding import reading_of
    from lm.runs.directory import open_run

    asked = {"--data": data, "--text": source, "--pairs": pairs, "--choices": choices, "--similarity": similarity}
    if len(given := [name for name, value in asked.items() if value]) > 1:
        raise UserError(f"{' and '.join(given)} are measured one at a time: name one of them")
    opened = open_run(run)
    checkpoint = opened.checkpoint(which)
    if pairs is not None:
        _evaluate_pairs(opened, checkpoint, pairs, columns, ties, as_json)
    elif choices is not None:
        _evaluate_choices(opened, checkpoint, choices, columns_of(task_columns), as_json)
    elif similarity is not None:
        reading = reading_of(opened.config, reads, pooling, layer)
        _evaluate_similarity(opened, checkpoint, similarity, columns_of(task_columns), reading, as_json)
    elif source is not None:
        _tell_losses(_evaluate_text(opened, checkpoint, source, text_field, stride), as_json)
    else:
        _tell_losses(evaluate_run(opened, data, checkpoint), as_json)


def _tell_losses(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    rows = []
    for losses, kind in ((result["validation"], ""), (result["floors"], " (floor)")):
        for name, loss in losses.items():
            nats = "" if loss["nats_per_token"] is None else f"{loss['nats_per_token']:.4f}"
            rows.append((name + kind, nats, f"{loss['bits_per_byte']:.4f}"))
    _print_table(
        ("", "nats per token", "bits per byte"),
        rows,
        f"step {result['step']:,}; {result['validation_tokens']:,} tokens, {result['validation_bytes']:,} bytes of "
        f"{result['data']}; {result['protocol']}",
    )


def _print_table(header: Iterable[str], rows: Iterable[Iterable[str]], explanation: str) -> None:
    from rich.table import Table

    from lm.cli.tables import console

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = console()
    out.print(table)
    out.print(explanation, markup=False)


def _told(accuracies: Iterable[Accuracy]) -> Iterator[str]:
    return (f"{accuracy.mean:.1%} ± {accuracy.error:.1%}" for accuracy in accuracies)


def _as_dicts(results: Mapping[str, Mapping[str, Accuracy]]) -> dict[str, dict[str, Any]]:
    return {name: {key: value.as_dict() for key, value in each.items()} for name, each in results.items()}


def _evaluate_text(run: Run, checkpoint: Checkpoint, source: str, text_field: str, stride: int) -> dict[str, Any]:
    from data_prep.settings import ReadSettings
    from lm.evaluation.perplexity import evaluate_text
    from lm.model.device import choose_device

    result = evaluate_text(
        run,
        run.load_model(choose_device("auto"), checkpoint),
        source,
        ReadSettings(text_field=text_field),
        stride=stride,
        progress=lambda text: click.echo(text, err=True),
    )
    return {"step": checkpoint.step, **result}


def _evaluate_choices(run: Run, checkpoint: Checkpoint, path: str, columns: Columns, as_json: bool) -> None:
    from lm.data.examples import read_examples
    from lm.evaluation.multiple_choice import NORMALISATIONS, evaluate_choices
    from lm.model.device import choose_device

    examples = read_examples(path, "choice", columns)
    results, cut = evaluate_choices(
        run,
        run.load_model(choose_device("auto"), checkpoint),
        examples,
        progress=lambda text: click.echo(text, err=True),
    )
    if as_json:
        click.echo(json.dumps({"questions": len(examples), "cut": cut, "accuracy": _as_dicts(results)}))
        return
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in NORMALISATIONS.items())
    shortened = f"; {cut:,} answers stand behind a question that lost its beginning" if cut else ""
    _print_table(
        ("", *NORMALISATIONS),
        ((name, *_told(each.values())) for name, each in results.items()),
        f"share of {len(examples):,} questions whose right answer is the likeliest, ± bootstrap error; {meanings}; "
        f"ties share the point{shortened}",
    )


def _evaluate_similarity(
    run: Run, checkpoint: Checkpoint, path: str, columns: Columns, reading: Reading, as_json: bool
) -> None:
    from lm.data.examples import read_similar
    from lm.finetuning.contrastive_task import similarity
    from lm.model.device import choose_device

    pairs = read_similar(path, columns)
    model = run.load_model(choose_device("auto"), checkpoint)
    found = similarity(model, run.tokenizer, pairs, reading, run.config.data.context_length)
    if as_json:
        click.echo(json.dumps({"pairs": len(pairs), **found}))
        return
    click.echo("  ".join(f"{name} {value:.4f}" for name, value in found.items()))
    click.echo(
        f"{len(pairs):,} pairs: correlation of how alike they are with the cosine of their embeddings; read "
        f"{reading.reads}, {reading.pooling} of layer {reading.layer}"
    )


def _evaluate_pairs(
    run: Run, checkpoint: Checkpoint, path: Path, columns: tuple[str, str], ties: str, as_json: bool
) -> None:
    from lm.evaluation import minimal_pairs
    from lm.model.device import choose_device

    paradigms = minimal_pairs.read_pairs(path, columns)
    model = run.load_model(choose_device("auto"), checkpoint)
    results = minimal_pairs.evaluate_run(
        run, model, paradigms, ties=ties, progress=lambda text: click.echo(text, err=True)
    )
    if as_json:
        click.echo(json.dumps({"ties": ties, "accuracy": _as_dicts(results)}))
        return
    equal = ", ".join(f"{name} {each['all'].ties:,}" for name, each in results.items())
    _print_table(
        ("", *results),
        ((name, *_told(each[name] for each in results.values())) for name in next(iter(results.values()))),
        f"share of pairs whose acceptable sentence is the likelier one, ± bootstrap error; temperature 1; ties score "
        f"{ties} (of {next(iter(results.values()))['all'].pairs:,}: {equal}); all: the mean over paradigms",
    )
