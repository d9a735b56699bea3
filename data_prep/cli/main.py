"""The commands of data preparation. Heavy imports happen inside commands, so that --help is fast."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from data_prep.cli.errors import FriendlyGroup
from data_prep.cli.help import Section
from data_prep.cli.options import options_of
from data_prep.cli.tables import print_table
from data_prep.errors import UserError
from data_prep.errors.command_names import command, example_recipe
from data_prep.errors.wording import counted
from data_prep.files import is_remote
from data_prep.settings import (
    DEFAULT_SHARD_TOKENS,
    BuildSettings,
    CleaningSettings,
    ImageSettings,
    ReadSettings,
    TokenizerSettings,
    VisualTokenSettings,
)

DIRECTORY = click.Path(path_type=Path)
STDOUT = Path("-")
SKIPPED_STATUS = 3
EMPTY = "empty document"  # the only skipped input that does not matter
EXPORTED = ("nanogpt", "llmc", "datatrove", "olmo")
IMPORTED = (*EXPORTED, "megatron")


def folder_or_url(text: str) -> Path | str:
    """The type of an argument that names a dataset."""
    return text if is_remote(text) else Path(text)


@click.group(
    cls=FriendlyGroup,
    short_help="Turn text or images into a dataset.",
)
def main() -> None:
    """Turn text into token shards, or images into image shards, and inspect the result."""


@main.command(
    short_help="Build a dataset from text.",
    sections=(
        Section("Dataset", "out validation_fraction dry_run as_json"),
        Section("Text", "document_per max_document_bytes text_field"),
        Section("Tokenizer", "vocab_size tokenizer_kind tokenizer"),
        Section("Cleaning", "language quality duplicates"),
    ),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--out", type=DIRECTORY, required=True, help="Folder for the dataset; created if missing.")
@options_of(ReadSettings, CleaningSettings, TokenizerSettings, BuildSettings)
@click.option("--dry-run", is_flag=True, help="Print an estimate without building anything.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def build(
    context: click.Context, sources: tuple[str, ...], out: Path, dry_run: bool, as_json: bool, **settings: Any
) -> None:
    """Build a dataset from text: files, folders, "builtin" (the documentation of Python), hf:NAME, - or a URL.

    \b
    kindling prep build my_texts/ --out data/mine --vocab-size 8192
    \f
    A SOURCE is a file (.txt, .md, .jsonl, .ndjson, .json, .csv, .tsv or .parquet; all but .parquet may be compressed
    as .gz, .zst, .bz2 or .xz; any other name is read as text), a folder of such files, a pattern ("texts/**/*.md"),
    - for standard input, "builtin" for the documentation in Python and installed packages, hf:NAME[:SPLIT] for a
    Hugging Face dataset or a local folder with one, or a URL supported by fsspec (s3://…). NAME=SOURCE names a source,
    SOURCE@2 gives it a weight in training.

    To resume a build that was stopped, run the same command again. Exit status 3 means that the dataset is complete,
    but damaged or unreadable input was skipped.
    """
    import data_prep

    if out == STDOUT:
        raise UserError("--out names a folder, so it cannot be standard output (-)")
    if dry_run:
        _print_estimate(BuildSettings.from_options(sources, out, **settings), as_json)
        return
    try:
        manifest = data_prep.build(sources, out, **settings).manifest
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; run the same command again to resume") from None
    _print_summary(out, manifest, as_json)
    if any(count for reason, count in manifest["left_out"].items() if reason != EMPTY):
        context.exit(SKIPPED_STATUS)


def _print_estimate(settings: BuildSettings, as_json: bool) -> None:
    from data_prep.pipeline.estimate import estimate_build

    found = estimate_build(settings)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    size = f"{counted(found.files, 'file')}, {found.file_bytes / 1e6:,.1f} MB"
    click.echo(f"{size}, in {counted(found.parts, 'part')}")
    about = "very roughly" if found.guessed else "about"
    click.echo(
        f"{about} {found.text_bytes / 1e6:,.1f} MB of text in {counted(found.documents, 'document')}, "
        f"{counted(found.tokens, 'token')}"
    )
    workers = counted(found.workers, "worker")
    click.echo(f"{about} {found.seconds:,.0f} s with {workers} and the encoder {found.encoder}")
    click.echo(f"{about} {found.disk_bytes / 1e6:,.1f} MB on disk, in {settings.out}")
    for sentence in found.advice:
        click.echo(f"note: {sentence}")
    if found.unread_files:
        click.echo(f"left out: {found.unread_files}")
    click.echo("nothing was written")


def _print_summary(out: Path, manifest: dict[str, Any], as_json: bool) -> None:
    totals = ("documents", "tokens", "text_bytes", "words", "lost_bytes", "unknown_tokens")
    splits = {name: {key: split.get(key) for key in totals} for name, split in manifest["splits"].items()}
    for split in splits.values():
        split["bytes_per_token"] = split["text_bytes"] / split["tokens"] if split["tokens"] else None
    if as_json:
        copied = {name: manifest[name] for name in ("tokenizer", "left_out", "cleaning", "corpus_sha256")}
        click.echo(json.dumps({"out": str(out), "splits": splits, **copied}, indent=2))
        return
    rows = [
        (
            name,
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            f"{split['text_bytes'] / 1e6:,.2f}",
            "–" if split["bytes_per_token"] is None else f"{split['bytes_per_token']:.2f}",
        )
        for name, split in splits.items()
    ]
    print_table(("split", "documents", "tokens", "text MB", "bytes per token"), rows)
    tokenizer = manifest["tokenizer"]
    click.echo(f"vocabulary: {tokenizer['vocab_size']:,} tokens ({tokenizer['kind']})")
    for name, split in splits.items():
        if split["lost_bytes"]:
            share = split["lost_bytes"] / split["text_bytes"]
            unknown = f" ({split['unknown_tokens']:,} unknown tokens)" if split["unknown_tokens"] else ""
            click.echo(
                f"lost: the tokenizer loses {share:.2%} of the {name} text, {split['lost_bytes']:,} bytes{unknown}; "
                "bits per byte do not count them"
            )
    for step, report in manifest["cleaning"].items():
        changed, removed = report["changed_documents"], report["removed_documents"]
        example = f" ({report['examples'][0]['reason']})" if report["examples"] else ""
        click.echo(f"{step}: changed {changed:,}, removed {counted(removed, 'document')}{example}")
    left_out = [f"{reason} {count:,}" for reason, count in manifest["left_out"].items() if count]
    if left_out:
        click.echo(f"left out: {', '.join(left_out)}")
    click.echo(f"in: {out}")
    click.echo(f"next: {command('train')} {example_recipe()} --data {out} --run runs/{out.resolve().name}")


@main.command(
    short_help="Build a dataset from images.",
    sections=(
        Section("Dataset", "out size channels validation_fraction validation dry_run as_json"),
        Section("Columns", "image_column label_column"),
    ),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--out", type=DIRECTORY, required=True, help="Folder for the dataset; created if missing.")
@click.option("--size", type=int, required=True, help="Pixels a side of the stored images, which are square.")
@options_of(ImageSettings)
@click.option("--dry-run", is_flag=True, help="Print an estimate without building anything.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def images(
    context: click.Context,
    sources: tuple[str, ...],
    out: Path,
    size: int,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Build a dataset from images: folders, flat or with a folder for each class, archives, hf:NAME, builtin:digits.

    \b
    kindling prep images my_photos/ --out data/photos --size 32
    \f
    A SOURCE is a folder of images (.jpg, .png, .webp, .gif, .tif and so on), flat or with a folder for each class; a
    .tar or .zip of such a folder, or a folder in it (photos.tar/train); a .parquet file; a pattern ("photos/**/*.jpg");
    hf:NAME[:SPLIT] for a Hugging Face dataset or a local folder with one; or "builtin:digits" for scikit-learn's
    handwritten digits. Folders called train and test (or val) at the top become the splits.

    Each image is turned upright, its shorter side scaled to --size, and the middle cut out. Classes are optional and
    serve to judge a model. An image that cannot be read is left out and reported.

    To resume a build that was stopped, run the same command again. Exit status 3 means that the dataset is complete,
    but images that cannot be used were left out.
    """
    from data_prep.cli.images import print_image_estimate, print_image_summary

    if out == STDOUT:
        raise UserError("--out names a folder, so it cannot be standard output (-)")
    if dry_run:
        print_image_estimate(ImageSettings.from_options(sources, out, size, **settings), as_json)
        return
    import data_prep

    try:
        manifest = data_prep.build_images(sources, out, size, **settings).manifest
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; run the same command again to resume") from None
    print_image_summary(out, manifest, as_json)
    if manifest["left_out"]:
        context.exit(SKIPPED_STATUS)


@main.command("visual-tokens", short_help="Turn a dataset of images into visual tokens.")
@click.argument("images", metavar="IMAGES", type=DIRECTORY)
@click.option("--out", type=DIRECTORY, required=True, help="Folder for the dataset; created if missing.")
@click.option("--patch-size", type=int, required=True, help="Side of a patch in pixels, a divisor of the images'.")
@options_of(VisualTokenSettings)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def visual_tokens(images: Path, out: Path, patch_size: int, as_json: bool, **settings: Any) -> None:
    """Turn a dataset of images into visual tokens.

    IMAGES is a dataset made by the command images. The patches of its training images are grouped into codes by
    k-means, and each image becomes a document: the codes of its patches, row by row. The result is a dataset of tokens
    like one of text, and its codebook.npy is what the objective beit predicts.

    To resume a build that was stopped, run the same command again.
    """
    from data_prep.cli.images import print_visual_tokens

    if out == STDOUT:
        raise UserError("--out names a folder, so it cannot be standard output (-)")
    import data_prep

    try:
        manifest = data_prep.build_visual_tokens(images, out, patch_size, **settings).manifest
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; run the same command again to resume") from None
    print_visual_tokens(images, out, manifest, as_json)


@main.command()
@click.argument("directory", type=folder_or_url)
@click.option("--documents", type=click.IntRange(min=0), help="Documents to show per split.  [default: 3]")
@click.option("--pictures", type=click.IntRange(min=0), help="Images to show of each class.  [default: 12]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for choosing what to show."
)
@click.option("--ids", is_flag=True, help="Show texts as tokens with their ids.")
@click.option("--page", "--html", type=DIRECTORY, help="Write a page to this .html file instead; - for stdout.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    directory: Path | str,
    documents: int | None,
    pictures: int | None,
    seed: int,
    ids: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Show a dataset as a model will see it.

    Of text: totals, document lengths, sample documents, a window across the end of a document, the most common tokens,
    unused tokens, and bytes per token by source. Of images: totals, classes, sizes, what was left out or changed, and
    on the page pictures of each class.
    """
    from data_prep.shards.images import holds_images

    if holds_images(directory):
        from data_prep.shards.images import open_images
        from data_prep.shards.inspect_images import inspect_images, render_images
        from data_prep.shards.inspect_page import render_images_page

        if ids or documents is not None:
            raise UserError(f'"{directory}" is a dataset of images: --documents and --ids are for text')
        shown_images = 12 if pictures is None else pictures
        found = inspect_images(open_images(directory), pictures=shown_images, seed=seed, pixels=page is not None)
        shown = render_images(found) if page is None else render_images_page(found)
    else:
        from data_prep.shards.inspect import inspect_dataset, render
        from data_prep.shards.inspect_page import render_page
        from data_prep.shards.tokens import open_dataset

        dataset = open_dataset(directory)
        if pictures is not None:
            raise UserError(f'"{directory}" is a dataset of text: --pictures is for images')
        found = inspect_dataset(dataset, documents=3 if documents is None else documents, seed=seed)
        shown = render(found, ids=ids) if page is None else render_page(found)
    if page == STDOUT:
        click.echo(shown)
        return
    if page is not None:
        from data_prep.files import write_atomically

        write_atomically(page, shown)
        shown = f"in: {page}"
    click.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else shown)


@main.command()
@click.argument("name", metavar="TOKENIZER")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@options_of(ReadSettings)
@click.option(
    "--most-bytes", type=click.IntRange(min=1), default=10_000_000, show_default=True, help="Bytes of text to read."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tokenizer(name: str, sources: tuple[str, ...], most_bytes: int, as_json: bool, **options: Any) -> None:
    """Show how a tokenizer handles some text.

    TOKENIZER is a tokenizer.json, a sentencepiece .model, a folder with either (a dataset, a run), or a name on the
    Hugging Face Hub. Each SOURCE is as for build. Prints bytes per token, unused tokens, the longest tokens, and how
    much text was lost.
    """
    from data_prep.sources.listing import first_texts, parse_sources, unread_files
    from data_prep.tokenizers.load import load_tokenizer
    from data_prep.tokenizers.report import tokenizer_report

    reading = ReadSettings(**options)
    found = tokenizer_report(load_tokenizer(name), first_texts(sources, most_bytes, reading))
    if unread := unread_files(parse_sources(sources), reading.reading_rules):
        click.echo(f"left out: {unread}", err=True)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for key, value in found.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{key.replace('_', ' ')}: {shown}")


@main.command()
@click.argument("directory", type=folder_or_url)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(directory: Path | str, as_json: bool) -> None:
    """Read a whole dataset and check it against its checksums."""
    from data_prep.progress import ConsoleReporter
    from data_prep.shards.images import holds_images, open_images
    from data_prep.shards.tokens import open_dataset

    is_images = holds_images(directory)
    dataset = open_images(directory) if is_images else open_dataset(directory)
    unit = "images" if is_images else "tokens"
    total = sum(split[unit] for split in dataset.manifest["splits"].values())
    with ConsoleReporter().stage("verifying", None) as advance:
        dataset.verify(on_file=lambda name, size: advance(size))
    if as_json:
        click.echo(json.dumps({"directory": str(directory), "whole": True, unit: total}))
    else:
        click.echo(f'"{directory}" is intact: {total:,} {unit}, all checksums match')


@main.command(short_help="Export to or import from the token files of other programs.")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=DIRECTORY)
@click.option("--to", "target", type=click.Choice(EXPORTED), help="Layout to export SOURCE, a dataset, to.")
@click.option("--from", "origin", type=click.Choice(IMPORTED), help="Layout of SOURCE, files or folders to import.")
@click.option("--tokenizer", type=DIRECTORY, help="With --from: the tokenizer.json that produced the tokens.")
@click.option("--out", type=DIRECTORY, required=True, help="New folder for the result.")
@click.option("--copy", is_flag=True, help="With --to: copy tokens even if a hard link would do.")
@click.option(
    "--shard-tokens",
    default=DEFAULT_SHARD_TOKENS,
    show_default=True,
    help="With --from: maximum tokens per shard file.",
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
    """Export a dataset to the token files of another program, or import such files.

    With --to, SOURCE is a dataset. With --from, each SOURCE is a file or a folder of files; those with the word val,
    valid or validation in their name become the validation split.
    """
    from data_prep.progress import ConsoleReporter
    from data_prep.shards.convert import export_dataset, import_dataset
    from data_prep.shards.tokens import open_dataset
    from data_prep.tokenizers.load import load_tokenizer

    if (target is None) == (origin is None):
        raise UserError("give either --to LAYOUT to export a dataset, or --from LAYOUT to import files")
    if target is not None:
        if len(sources) > 1:
            raise UserError("--to takes one dataset at a time")
        written = export_dataset(open_dataset(sources[0]), target, out, copy=copy, progress=ConsoleReporter())
        found = {"out": str(out), "layout": target, "files": written}
        click.echo(json.dumps(found, indent=2) if as_json else f"in: {out} ({counted(len(written), 'file')})")
        return
    assert origin is not None
    if tokenizer is None:
        raise UserError("--from needs the --tokenizer that produced the tokens")
    loaded = load_tokenizer(tokenizer)
    manifest = import_dataset(sources, origin, loaded, out, shard_tokens=shard_tokens, progress=ConsoleReporter())
    _print_summary(out, manifest, as_json)
