"""``kindling evaluate``: evaluate a trained model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.cli.tables import print_table
from data_prep.errors import UserError
from data_prep.errors.wording import counted
from lm.cli.options import (
    checkpoint_option,
    columns_of,
    columns_options,
    json_option,
    reading_options,
    run_argument,
    whiten_option,
)

if TYPE_CHECKING:
    from lm.data.examples import Columns

IMAGES = "a folder with a folder for each class, or another source or dataset of images"
OF_RUN = "Default: the training data's"
# The options for runs on images, and for all runs; the others are for text.
OF_IMAGES, OF_BOTH = ("train", "test"), ("run", "data", "layer", "which", "as_json")


@click.command(
    cls=FriendlyCommand,
    short_help="Measure a model next to baselines.",
    sections=(
        Section("On what", "data source pairs choices similarity", "text_field stride columns ties"),
        Section("Columns", "text_column label_column", "text_pair_column choices_column"),
        Section("Images", "train test"),
        Section("Model", "which", "reads pooling layer whiten"),
    ),
)
@run_argument
@click.option("--data", default="", help="Folder of token shards to evaluate on. Default: the training data.")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Evaluate on minimal pairs, such as BLiMP: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a folder.",
)
@click.option(
    "--text",
    "source",
    help="Evaluate on any text; a file, folder, pattern or other source that data preparation can read.",
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
    help="Evaluate on multiple-choice questions; .jsonl, .json, .csv, .tsv, .parquet or hf:NAME[:SPLIT].",
)
@click.option(
    "--similarity",
    help="Evaluate embeddings on pairs of texts with a similarity; its rank correlation with their cosine.",
)
@columns_options("text", "text_pair", "choices", "label", also=False)  # --text-field is for --text
@click.option("--train", default="", help=f"Images to fit k-NN and linear probe on; {IMAGES}. {OF_RUN} train split.")
@click.option("--test", default="", help=f"Images to test them on; {IMAGES}. {OF_RUN} validation split.")
@reading_options
@whiten_option
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
    train: str,
    test: str,
    reads: str | None,
    pooling: str | None,
    layer: int,
    whiten: str | None,
    columns: tuple[str, str],
    ties: str,
    which: str,
    as_json: bool,
    **task_columns: str | None,
) -> None:
    """Evaluate RUN: the loss of each readout on the whole validation split, in nats per token and bits per byte.

    \b
    kindling evaluate runs/mine
    kindling evaluate runs/mine --pairs blimp/
    \f
    Baselines are shown for comparison: token frequencies (unigram) and bz2 -9 on the same text. With --text: the same
    on any text. With --pairs: how often the acceptable one of two sentences is more likely. With --choices: how often
    the right answer to a question is the most likely. With --similarity: how well embeddings rank pairs of texts.

    If RUN reads images: the accuracy of k-NN and of a linear probe on its frozen features, next to those on raw pixels
    and on the features of random weights.
    """
    options = {"--data": data, "--text": source, "--pairs": pairs, "--choices": choices, "--similarity": similarity}
    if len(given := [name for name, value in options.items() if value]) > 1:
        raise UserError(f"{' and '.join(given)} cannot be combined: choose one of them")
    _check_kind(run, click.get_current_context(), (train, test))
    _check_inputs(run, data, pairs, source, text_field, stride, choices, similarity, whiten, columns_of(task_columns))
    from lm import api

    result = api.evaluate(
        run,
        data=data,
        text=source or "",
        text_field=text_field,
        stride=stride,
        pairs=pairs or "",
        sentences=columns,
        ties=ties,
        choices=choices or "",
        similarity=similarity or "",
        train=train,
        test=test,
        columns=columns_of(task_columns),
        reads=reads,
        pooling=pooling,
        layer=layer,
        whiten=whiten or "",
        checkpoint=which,
        progress=lambda text: click.echo(text, err=True),
    )
    if as_json:
        click.echo(json.dumps(result))
    elif "features" in result:
        _print_features(result)
    elif pairs is not None:
        _print_pairs(result)
    elif choices is not None:
        _print_choices(result)
    elif similarity is not None:
        words = result["baselines"]["tfidf"]
        rows = [
            (name, *(f"{found[kind]:.4f}" for kind in words))
            for name, found in (("embeddings", result), ("words weighted by TF-IDF (baseline)", words))
        ]
        of = counted(result["pairs"], "pair")
        print_table(("", *words), rows, f"{of}: correlation of their similarity with the cosine of their vectors")
    else:
        _print_losses(result)


def _check_kind(run: Path, context: click.Context, images: tuple[str, str]) -> None:
    """Raise UserError for options of the other kind of run, and for images that are not there, before PyTorch loads."""
    from lm.config.recipes import run_config

    reads_images = run_config(run).reads_images
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name not in OF_BOTH and (option.name in OF_IMAGES) != reads_images:
            kind, other = ("images", "text") if reads_images else ("text", "images")
            raise UserError(f"{run} reads {kind}, and {option.opts[0]} is for a run that reads {other}: leave it out")
    if named := [source for source in images if source]:
        from lm.data.image_files import has_validation

        for source in named:
            has_validation(source)


def _check_inputs(
    run: Path,
    data: str,
    pairs: Path | None,
    source: str | None,
    text_field: str,
    stride: int,
    choices: str | None,
    similarity: str | None,
    whiten: str | None,
    columns: Columns,
) -> None:
    """Raise UserError for what is wrong with the run or with the beginning of a file, before PyTorch loads."""
    from data_prep.settings import ReadSettings
    from data_prep.sources.listing import STDIN, first_texts
    from lm.config.recipes import require_language_model, require_stride, require_text_model, run_config
    from lm.data.datasets import open_training_data
    from lm.data.examples import check_first_example

    config = run_config(run)
    if data:
        open_training_data((data,), config.data.access)
    if config.reads_images:
        return
    (require_text_model if similarity else require_language_model)(run, config)
    if pairs and not pairs.exists():
        raise UserError(f"there are no pairs at {pairs}")
    if source:
        require_stride(stride, config)
        if source != STDIN and not any(first_texts((source,), 1, ReadSettings(text_field=text_field))):
            raise UserError(f"there is no text in {source}")
    if choices:
        check_first_example(choices, "choice", columns)
    if similarity:
        check_first_example(similarity, "regression", columns)
    if whiten:
        if not similarity:
            raise UserError("--whiten is for the vectors of --similarity: leave it out")
        check_first_example(whiten, "classification", columns, labeled=False)


def _print_losses(result: dict[str, Any]) -> None:
    from lm.evaluation.validation_loss import verdict
    from lm.objectives.diffusion import BOUND

    rows = []
    for losses, kind in ((result["validation"], ""), (result["floors"], " (baseline)")):
        for name, loss in losses.items():
            nats = "" if loss["nats_per_token"] is None else f"{loss['nats_per_token']:.4f}"
            shown = f"{name} (at most)" if name == BOUND else name + kind
            rows.append((shown, nats, f"{loss['bits_per_byte']:.4f}"))
    print_table(
        ("", "nats per token", "bits per byte"),
        rows,
        "\n".join(
            [
                verdict(result),
                f"step {result['step']:,}; {result['validation_tokens']:,} tokens, "
                f"{result['validation_bytes']:,} bytes of {result['data']}",
                *result["protocol"].split("; "),
            ]
        ),
    )


def _print_features(result: dict[str, Any]) -> None:
    from lm.evaluation.image_features import NAMES, verdict

    def shown(found: dict[str, float]) -> str:
        return f"{found['accuracy']:.1%} ± {found['error']:.1%}"

    rows: list[tuple[str, ...]] = []
    for name, probes in {"features": result["features"], **result["baselines"]}.items():
        if name == "majority":
            rows.append(("most frequent class (baseline)", shown(probes), shown(probes)))
        elif probes:
            called = f"{NAMES[name]} (baseline)" if name in NAMES else name
            rows.append((called, *map(shown, probes.values())))
    health = f"spread {result['spread']:.3f}, effective rank {result['effective_rank']:.1f}"
    losses = [
        f"{name}: loss {own['loss']:.4f} on {own['images']:,} validation images; "
        for name, own in result["validation"].items()
    ]
    explanation = [verdict(result), f"step {result['step']:,}; {''.join(losses)}{health}", *result.get("notes", [])]
    explanation += result["protocol"].split("; ") if "protocol" in result else []
    if rows:
        print_table(("", NAMES["knn"], NAMES["linear"]), rows, "\n".join(explanation))
    else:
        click.echo("\n".join(explanation))


def _percentages(accuracies: Iterable[dict[str, float]]) -> Iterator[str]:
    return (f"{accuracy['mean']:.1%} ± {accuracy['error']:.1%}" for accuracy in accuracies)


def _label(name: str) -> str:
    """How a table calls the row or column ``name`` of a result."""
    return name.replace("(floor)", "(baseline)")


def _print_choices(result: dict[str, Any]) -> None:
    from lm.evaluation.multiple_choice import NORMALIZATIONS

    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in NORMALIZATIONS.items())
    cut = f"; {result['cut']:,} answers follow a question that lost its beginning" if result["cut"] else ""
    print_table(
        ("", *NORMALIZATIONS),
        ((_label(name), *_percentages(each.values())) for name, each in result["accuracy"].items()),
        f"share of {result['questions']:,} questions whose right answer is the most likely, ± bootstrap error; "
        f"{meanings}; equally likely answers share the point{cut}",
    )


def _print_pairs(result: dict[str, Any]) -> None:
    columns = result["accuracy"]
    first = next(iter(columns.values()))
    equal = ", ".join(f"{_label(name)} {each['all']['ties']:,}" for name, each in columns.items())
    print_table(
        ("", *map(_label, columns)),
        ((name, *_percentages(each[name] for each in columns.values())) for name in first),
        f"share of pairs whose acceptable sentence is more likely, ± bootstrap error; temperature 1; ties score "
        f"{result['ties']} (of {first['all']['pairs']:,}: {equal}); all: the mean over paradigms",
    )
