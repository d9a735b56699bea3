"""The commands of data preparation. Heavy imports wait until a command runs: --help is quick."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyGroup
from data_prep.cli.options import cleaning_options, reading_options, tokenizer_options
from data_prep.cores import available_cores
from data_prep.errors import UserError

if TYPE_CHECKING:
    from data_prep.pipeline.build import BuildSettings

DIRECTORY = click.Path(path_type=Path)
LEFT_OUT_STATUS = 3
EMPTY = "empty document"  # the one thing left out that nobody misses
EXPORTED = ("nanogpt", "llmc", "datatrove", "olmo")
IMPORTED = (*EXPORTED, "megatron")


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Raw text to token shards: train a tokenizer, encode, and look at the result."""


@main.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--out", type=DIRECTORY, required=True, help="Folder for the dataset; it is made if it is not there.")
@reading_options
@cleaning_options
@tokenizer_options
@click.option(
    "--validation-fraction",
    type=float,
    default=0.05,
    show_default=True,
    help="Share of the documents kept for validation, from 0 to below 1.",
)
@click.option("--shard-tokens", type=int, default=2**26, show_default=True, help="Most tokens in one file.")
@click.option("--workers", type=int, default=None, help="Processes that work.  [default: the cores available]")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where they work: on this machine, or on the Ray cluster that RAY_ADDRESS names.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def build(context: click.Context, dry_run: bool, as_json: bool, workers: int | None, **options: Any) -> None:
    """Make a dataset from text.

    A SOURCE is a file (.txt, .md, .jsonl, .csv, .parquet, any but the last with .gz, .zst, .bz2 or .xz), a folder of
    such files, a pattern ("texts/**/*.md"), - for standard input, "builtin" for the documentation inside Python and
    installed packages, hf:NAME[:SPLIT] for a Hugging Face dataset or a local folder of one, or an address that fsspec
    knows (s3://…). NAME=SOURCE gives it a name, SOURCE@2 a weight in training.

    A build that was stopped goes on when the same command is called again. Exit status 3 says that the dataset is
    whole, but that something damaged or unreadable was left out.
    """
    from data_prep.pipeline.build import BuildSettings
    from data_prep.pipeline.build import build as build_dataset
    from data_prep.progress import ConsoleReporter

    settings = BuildSettings.from_options(workers=workers or available_cores(), **options)
    if dry_run:
        _tell_estimate(settings, as_json)
        return
    try:
        manifest = build_dataset(settings, progress=ConsoleReporter())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; call the same command again to go on") from None
    if as_json:
        click.echo(json.dumps(_summary(settings.out, manifest), indent=2))
    else:
        _print_summary(settings.out, manifest)
    if any(count for reason, count in manifest["left_out"].items() if reason != EMPTY):
        context.exit(LEFT_OUT_STATUS)


def _tell_estimate(settings: BuildSettings, as_json: bool) -> None:
    from data_prep.pipeline.estimate import estimate

    found = estimate(settings)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    click.echo(f"{found.files:,} files, {found.file_bytes / 1e6:,.1f} MB, in {found.parts:,} parts")
    about = "very roughly" if found.guessed else "about"
    click.echo(
        f"{about} {found.text_bytes / 1e6:,.1f} MB of text in {found.documents:,} documents, {found.tokens:,} tokens"
    )
    click.echo(f"{about} {found.seconds:,.0f} s with {settings.workers} workers, encoded by {found.encoder}")
    click.echo(f"{about} {found.disk_bytes / 1e6:,.1f} MB on the disk, in {settings.out}")
    click.echo("nothing was written")


def _summary(out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    counted = ("documents", "tokens", "text_bytes", "words")
    splits = {name: {key: split[key] for key in counted} for name, split in manifest["splits"].items()}
    for split in splits.values():
        split["bytes_per_token"] = split["text_bytes"] / split["tokens"] if split["tokens"] else None
    return {
        "out": str(out),
        "splits": splits,
        "tokenizer": manifest["tokenizer"],
        "left_out": manifest["left_out"],
        "cleaning": manifest["cleaning"],
        "corpus_sha256": manifest["corpus_sha256"],
    }


def _print_summary(out: Path, manifest: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("split", "documents", "tokens", "text MB", "bytes per token"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in _summary(out, manifest)["splits"].items():
        ratio = "–" if split["bytes_per_token"] is None else f"{split['bytes_per_token']:.2f}"
        row = (f"{split['documents']:,}", f"{split['tokens']:,}", f"{split['text_bytes'] / 1e6:,.2f}", ratio)
        table.add_row(name, *row)
    Console(highlight=False).print(table)
    tokenizer = manifest["tokenizer"]
    click.echo(f"vocabulary: {tokenizer['vocab_size']:,} tokens ({tokenizer['kind']})")
    for step, report in manifest["cleaning"].items():
        changed, removed = report["changed_documents"], report["removed_documents"]
        example = f" ({report['examples'][0]['reason']})" if report["examples"] else ""
        click.echo(f"{step}: changed {changed:,}, removed {removed:,} documents{example}")
    left_out = [f"{reason} {count:,}" for reason, count in manifest["left_out"].items() if count]
    if left_out:
        click.echo(f"left out: {', '.join(left_out)}")
    click.echo(f"in: {out}")
    click.echo(f"next: python train.py configs/tiny.toml --data {out} --run runs/{out.resolve().name}")


@main.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--documents", type=int, default=3, show_default=True, help="Documents of each split to show.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the documents.")
@click.option("--ids", is_flag=True, help="Show texts as single tokens with their ids.")
@click.option("--page", type=DIRECTORY, help="Write a page with pictures to this .html file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(directory: Path, documents: int, seed: int, ids: bool, page: Path | None, as_json: bool) -> None:
    """Show what a model will see.

    That is: totals, lengths of documents, a few of them, a window over a document's end, the most common tokens and
    those never used, and bytes per token by source.
    """
    from data_prep.shards.inspect import inspect_dataset, render
    from data_prep.shards.tokens import open_dataset

    found = inspect_dataset(open_dataset(directory), documents=documents, seed=seed)
    if page is not None:
        from data_prep.files import write_atomically
        from data_prep.shards.inspect_page import render_page

        write_atomically(page, render_page(found))
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        click.echo(render(found, ids=ids) if page is None else f"in: {page}")


@main.command()
@click.argument("name", metavar="TOKENIZER")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@reading_options
@click.option("--most-bytes", type=int, default=10_000_000, show_default=True, help="Bytes of text to look at.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tokenizer(name: str, sources: tuple[str, ...], most_bytes: int, as_json: bool, **options: Any) -> None:
    """Tell what a tokenizer makes of some text.

    TOKENIZER is a tokenizer.json, a sentencepiece .model, a folder that holds one (a dataset, a run), or a hub name.
    Each SOURCE is one as of build. Told are bytes per token, tokens never used, the longest ones, and what was lost.
    """
    from data_prep.sources.listing import ReadSettings, first_texts
    from data_prep.tokenizers.load import load_tokenizer
    from data_prep.tokenizers.report import tokenizer_report

    found = tokenizer_report(load_tokenizer(name), first_texts(sources, most_bytes, ReadSettings(**options)))
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for key, value in found.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{key.replace('_', ' ')}: {shown}")


@main.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(directory: Path, as_json: bool) -> None:
    """Read a whole dataset and compare it with its checksums."""
    from data_prep.progress import ConsoleReporter
    from data_prep.shards.tokens import open_dataset

    dataset = open_dataset(directory)
    total = sum(dataset.split(name).tokens for name in ("train", "validation"))
    with ConsoleReporter().stage("verifying", None) as advance:
        dataset.verify(on_file=lambda name, size: advance(size))
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "whole": True, "tokens": total}))
    else:
        click.echo(f'"{directory}" is whole: {total:,} tokens, every checksum as it was built')


@main.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=DIRECTORY)
@click.option("--to", "target", type=click.Choice(EXPORTED), help="Layout to write SOURCE, a dataset, in.")
@click.option("--from", "origin", type=click.Choice(IMPORTED), help="Layout that SOURCE, files or folders, has.")
@click.option("--tokenizer", type=DIRECTORY, help="With --from: the tokenizer.json that made the tokens.")
@click.option("--out", type=DIRECTORY, required=True, help="New folder for the result.")
@click.option("--copy", is_flag=True, help="With --to: copy the tokens where a hard link would do.")
@click.option(
    "--shard-tokens", type=int, default=2**26, show_default=True, help="With --from: most tokens in one file."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def convert(
    sources: tuple[Path, ...],
    target: str | None,
    origin: str | None,
    tokenizer: Path | None,
    out: Path,
    copy: bool,
    shard_tokens: int,
    as_json: bool,
) -> None:
    """Take a dataset to the token files of another program, or bring such files in.

    With --to, SOURCE is a dataset. With --from, each SOURCE is a file or a folder of them; those with the word val,
    valid or validation in their name become the validation split.
    """
    from data_prep.progress import ConsoleReporter
    from data_prep.shards.convert import export_dataset, import_dataset
    from data_prep.shards.tokens import open_dataset
    from data_prep.tokenizers.load import load_tokenizer

    if (target is None) == (origin is None):
        raise UserError("give either --to LAYOUT for a dataset, or --from LAYOUT for other files")
    if target is not None:
        if len(sources) > 1:
            raise UserError("--to takes one dataset at a time")
        written = export_dataset(open_dataset(sources[0]), target, out, copy=copy, progress=ConsoleReporter())
        found = {"out": str(out), "layout": target, "files": written}
        click.echo(json.dumps(found, indent=2) if as_json else f"in: {out} ({len(written)} files)")
        return
    assert origin is not None
    if tokenizer is None:
        raise UserError("--from needs the --tokenizer that made the tokens")
    loaded = load_tokenizer(tokenizer)
    manifest = import_dataset(sources, origin, loaded, out, shard_tokens=shard_tokens, progress=ConsoleReporter())
    if as_json:
        click.echo(json.dumps(_summary(out, manifest), indent=2))
    else:
        _print_summary(out, manifest)
