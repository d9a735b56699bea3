"""``kindling evaluate``: evaluate a trained model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    from lm.inference.language_model import LanguageModel


@click.command(cls=FriendlyCommand)
@run_argument
@click.option("--data", default="", help="Folder of token shards to evaluate on. Default: the training data.")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Evaluate on minimal pairs: a .jsonl, .csv, .tsv or .parquet file, or a folder of them (BLiMP).",
)
@click.option(
    "--text",
    "source",
    help="Evaluate on any text: a file, folder, pattern or other source that data preparation can read.",
)
@click.option(
    "--text-field", default="text", show_default=True, help="--text: the field of records that contains the text."
)
@click.option(
    "--stride",
    default=0,
    show_default=True,
    help="--text: tokens scored per window, the others being context; 0: all, in adjacent windows.",
)
@click.option(
    "--choices",
    help="Evaluate on multiple-choice questions: .jsonl, .csv, .tsv, .parquet or hf:NAME[:SPLIT].",
)
@click.option(
    "--similarity",
    help="Evaluate embeddings on pairs of texts with a similarity: its rank correlation with their cosine.",
)
@columns_options("text", "text_pair", "choices", "label")
@reading_options
@click.option(
    "--columns",
    nargs=2,
    default=("sentence_good", "sentence_bad"),
    show_default=True,
    help="--pairs: the columns of the acceptable and the unacceptable sentence.",
)
@click.option(
    "--ties",
    type=click.Choice(["half", "first"]),
    default="half",
    show_default=True,
    help="--pairs: score of two equally likely sentences; first: 1, which is common but flattering.",
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
    """Evaluate RUN: the loss of each readout on the whole validation split, in nats per token and bits per byte.

    Baselines are shown for comparison: token frequencies (unigram) and bz2 -9 on the same text. With --text: the same
    on any text. With --pairs: how often the acceptable one of two sentences is more likely. With --choices: how often
    the right answer to a question is the most likely. With --similarity: how well embeddings rank pairs of texts.
    """
    from lm.evaluation.validation_loss import evaluate as evaluate_run
    from lm.inference.embedding import reading_of
    from lm.inference.language_model import LanguageModel
    from lm.model.device import choose_device
    from lm.runs.directory import open_run

    options = {"--data": data, "--text": source, "--pairs": pairs, "--choices": choices, "--similarity": similarity}
    if len(given := [name for name, value in options.items() if value]) > 1:
        raise UserError(f"{' and '.join(given)} cannot be combined: choose one of them")
    opened = open_run(run)
    checkpoint = opened.checkpoint(which)

    def model() -> LanguageModel:  # loaded after the files of examples have been read
        return LanguageModel(opened.load_model(choose_device("auto"), checkpoint), opened.tokenizer, opened.config)

    if pairs is not None:
        _evaluate_pairs(model, pairs, columns, ties, as_json)
    elif choices is not None:
        _evaluate_choices(model, choices, columns_of(task_columns), as_json)
    elif similarity is not None:
        reading = reading_of(opened.config, reads, pooling, layer)
        _evaluate_similarity(model, similarity, columns_of(task_columns), reading, as_json)
    elif source is not None:
        from data_prep.settings import ReadSettings
        from lm.evaluation.perplexity import evaluate_text

        found = evaluate_text(
            model(), source, ReadSettings(text_field=text_field), stride=stride, progress=_print_progress
        )
        _print_losses({"step": checkpoint.step, **found}, as_json)
    else:
        _print_losses(evaluate_run(opened, data, checkpoint), as_json)


def _print_progress(text: str) -> None:
    click.echo(text, err=True)


def _print_losses(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    rows = []
    for losses, kind in ((result["validation"], ""), (result["floors"], " (baseline)")):
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


def _percentages(accuracies: Iterable[Accuracy]) -> Iterator[str]:
    return (f"{accuracy.mean:.1%} ± {accuracy.error:.1%}" for accuracy in accuracies)


def _label(name: str) -> str:
    """Return how a table calls the row or column ``name`` of a result."""
    return name.replace("(floor)", "(baseline)")


def _as_dicts(results: Mapping[str, Mapping[str, Accuracy]]) -> dict[str, dict[str, Any]]:
    return {name: {key: value.as_dict() for key, value in each.items()} for name, each in results.items()}


def _evaluate_choices(load: Callable[[], LanguageModel], path: str, columns: Columns, as_json: bool) -> None:
    from lm.data.examples import read_examples
    from lm.evaluation.multiple_choice import NORMALIZATIONS, evaluate_choices

    examples = read_examples(path, "choice", columns)
    results, cut = evaluate_choices(load(), examples, progress=_print_progress)
    if as_json:
        click.echo(json.dumps({"questions": len(examples), "cut": cut, "accuracy": _as_dicts(results)}))
        return
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in NORMALIZATIONS.items())
    shortened = f"; {cut:,} answers follow a question that lost its beginning" if cut else ""
    _print_table(
        ("", *NORMALIZATIONS),
        ((_label(name), *_percentages(each.values())) for name, each in results.items()),
        f"share of {len(examples):,} questions whose right answer is the most likely, ± bootstrap error; {meanings}; "
        f"equally likely answers share the point{shortened}",
    )


def _evaluate_similarity(
    load: Callable[[], LanguageModel], path: str, columns: Columns, reading: Reading, as_json: bool
) -> None:
    from lm.data.examples import read_similar
    from lm.finetuning.contrastive_task import similarity

    pairs = read_similar(path, columns)
    found = similarity(load(), pairs, reading)
    if as_json:
        click.echo(json.dumps({"pairs": len(pairs), **found}))
        return
    click.echo("  ".join(f"{name} {value:.4f}" for name, value in found.items()))
    click.echo(
        f"{len(pairs):,} pairs: correlation of their similarity with the cosine of their embeddings; read "
        f"{reading.reads}, {reading.pooling} of layer {reading.layer}"
    )


def _evaluate_pairs(
    load: Callable[[], LanguageModel], path: Path, columns: tuple[str, str], ties: str, as_json: bool
) -> None:
    from lm.evaluation import minimal_pairs

    paradigms = minimal_pairs.read_pairs(path, columns)
    results = minimal_pairs.evaluate_model(load(), paradigms, ties=ties, progress=_print_progress)
    if as_json:
        click.echo(json.dumps({"ties": ties, "accuracy": _as_dicts(results)}))
        return
    equal = ", ".join(f"{_label(name)} {each['all'].ties:,}" for name, each in results.items())
    _print_table(
        ("", *map(_label, results)),
        ((name, *_percentages(each[name] for each in results.values())) for name in next(iter(results.values()))),
        f"share of pairs whose acceptable sentence is more likely, ± bootstrap error; temperature 1; ties score "
        f"{ties} (of {next(iter(results.values()))['all'].pairs:,}: {equal}); all: the mean over paradigms",
    )
