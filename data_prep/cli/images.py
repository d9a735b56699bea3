"""What the command ``images`` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from data_prep.cli.tables import print_table
from data_prep.errors.command_names import command, example_recipe
from data_prep.errors.wording import counted
from data_prep.settings import ImageSettings

MOST_NAMES = 10


def print_image_estimate(settings: ImageSettings, as_json: bool) -> None:
    """Print what a build of images would do."""
    from data_prep.pipeline.image_estimate import estimate_images

    found = estimate_images(settings)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    number = "an unknown number of images" if found.images is None else counted(found.images, "image")
    click.echo(f"{number} in {counted(found.files, 'file')}, {found.file_bytes / 1e6:,.1f} MB")
    click.echo(f"{some_classes(found.classes)}; {counted(found.channels, 'channel')}")
    if found.seconds is not None and found.disk_bytes is not None:
        click.echo(f"about {found.seconds:,.0f} s with {counted(found.workers, 'worker')}")
        click.echo(f"about {found.disk_bytes / 1e6:,.1f} MB on disk, in {settings.out}")
    for sentence in found.notes:
        click.echo(sentence)
    click.echo(f"nothing was written; {counted(found.sampled, 'image')} were decoded")


def print_image_summary(out: Path, manifest: dict[str, Any], as_json: bool) -> None:
    """Print what a build of images made."""
    if as_json:
        splits = {
            name: {key: value for key, value in split.items() if key != "shards"}
            for name, split in manifest["splits"].items()
        }
        copied = {name: manifest[name] for name in ("processor", "classes", "left_out", "changed")}
        click.echo(json.dumps({"out": str(out), "splits": splits, **copied}, indent=2, ensure_ascii=False))
        return
    rows = [
        (
            name,
            f"{split['images']:,}",
            f"{sum(split['classes'].values()):,}",
            f"{sum(record['bin_bytes'] for record in split['shards']) / 1e6:,.2f}",
        )
        for name, split in manifest["splits"].items()
    ]
    print_table(("split", "images", "with a class", "MB"), rows)
    processor = manifest["processor"]
    size, color = processor["size"], "color" if processor["channels"] == 3 else "gray"
    click.echo(f"images: {color}, {size} x {size} pixels; {some_classes(manifest['classes'])}")
    if left_out := [f"{reason} {cases['images']:,}" for reason, cases in manifest["left_out"].items()]:
        click.echo(f"left out: {', '.join(left_out)}")
    click.echo(f"in: {out}")
    recipe = example_recipe("images-simclr")
    click.echo(f"next: {command('train')} {recipe} --data {out} --run runs/{out.resolve().name}")


def print_visual_tokens(images: Path, out: Path, manifest: dict[str, Any], as_json: bool) -> None:
    """Print what a build of visual tokens made."""
    found = manifest["visual_tokenizer"]
    counts = {name: {key: split[key] for key in ("documents", "tokens")} for name, split in manifest["splits"].items()}
    if as_json:
        splits = {name: counts[name] | measured for name, measured in found["splits"].items()}
        click.echo(json.dumps({"out": str(out), "splits": splits, "visual_tokenizer": found}, indent=2))
        return
    rows = [
        (
            name,
            f"{counts[name]['documents']:,}",
            f"{counts[name]['tokens']:,}",
            f"{measured['used_codes']:,} of {found['codes']:,}",
            "–" if measured["perplexity"] is None else f"{measured['perplexity']:,.0f}",
            "–" if measured["pixel_error"] is None else f"{measured['pixel_error']:.1f}",
        )
        for name, measured in found["splits"].items()
    ]
    print_table(("split", "images", "tokens", "codes used", "perplexity", "pixel error"), rows)
    size = found["patch_size"]
    click.echo(f"codes: of patches of {size} x {size} pixels; the pixel error is the root mean square, of 255")
    click.echo(f"in: {out}")
    click.echo(
        f"next: {command('train')} {example_recipe('images-beit')} --data {images} --visual-tokenizer {out} "
        f"--patch-size {size} --run runs/{out.resolve().name}"
    )


def some_classes(names: list[str]) -> str:
    """Return how many classes there are, with the first names."""
    if not names:
        return "no classes"
    more = ", …" if len(names) > MOST_NAMES else ""
    return f"{len(names):,} class{'' if len(names) == 1 else 'es'} ({', '.join(names[:MOST_NAMES])}{more})"
