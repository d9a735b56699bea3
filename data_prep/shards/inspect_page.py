"""The result of ``inspect`` as one self-contained page: plots, tables, texts with every token marked, or pictures."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jinja2

from data_prep.shards.inspect_images import MOST_CLASSES, SHOWN_SIDE, counted_classes, counted_images

CURVE_WIDTH, CURVE_HEIGHT = 100.0, 100.0  # in drawing units, which are percent of the plot
SHADES = 4
UNFOLDED, LONGEST_UNFOLDED = 100, 130  # tokens of a text that are shown at once, and of a text that is not folded
RAW_BYTE = re.compile(r"\\x[89a-f][0-9a-f]")  # how token_text shows a byte of an incomplete character
SMALLEST_PICTURE = 64  # pixels a side on the page


def render_page(found: dict[str, Any]) -> str:
    """Render the result of ``inspect.inspect_dataset`` as HTML, with all content from the dataset escaped."""
    page = _template("inspect.html")
    tokenizer, fingerprint = found["tokenizer"], found["fingerprint"][:16]
    return page.render(
        name=Path(found["directory"]).resolve().name,
        lead=f"{tokenizer['kind']} tokenizer of {tokenizer['vocab_size']:,} tokens; dataset {fingerprint}",
        unfolded=UNFOLDED,
        longest=LONGEST_UNFOLDED,
        splits={name: _shown(split, tokenizer["end_of_text_id"]) for name, split in found["splits"].items()},
    )


def render_images_page(found: dict[str, Any]) -> str:
    """Render the result of ``inspect_images.inspect_images`` as HTML, with all names from the dataset escaped."""
    form = found["processor"]
    color = "color" if form["channels"] == 3 else "gray"
    return _template("inspect_images.html").render(
        name=Path(found["directory"]).resolve().name,
        lead=f"{color} images of {form['size']} x {form['size']} pixels, {counted_classes(len(found['classes']))}; "
        f"dataset {found['fingerprint'][:16]}",
        cases=[
            (title, column, [{"reason": reason} | row for reason, row in found[name].items()])
            for name, title, column in (("left_out", "Left out", "why"), ("changed", "Changed", "what was done"))
        ],
        side=max(SMALLEST_PICTURE, min(form["size"], SHOWN_SIDE)),
        enlarged=form["size"] < SMALLEST_PICTURE,
        counted_images=counted_images,
        splits={name: _with_bars(split) for name, split in found["splits"].items()},
    )


def _with_bars(split: dict[str, Any]) -> dict[str, Any]:
    if not split["images"]:
        return split
    most = max(row["images"] for row in split["common_sizes"])
    return split | {
        "bars": [row | {"percent": round(100 * row["images"] / most, 2)} for row in split["common_sizes"]],
        "more_classes": max(0, sum(count > 0 for count in split["classes"].values()) - MOST_CLASSES),
    }


def _template(name: str) -> jinja2.Template:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def _shown(split: dict[str, Any], end_of_text_id: int) -> dict[str, Any]:
    if split["documents"] == 0:
        return split
    most = max(row["documents"] for row in split["length_histogram"])
    window = [_spans(part, end_of_text_id) for part in split["window"]]
    return split | {
        "bars": [row | {"percent": round(100 * row["documents"] / most, 2)} for row in split["length_histogram"]],
        "curve": _curve(split["rank_frequency"]),
        "sources": [row | {"size": _size(row["text_bytes"])} for row in split["sources"]],
        "texts": [sample | {"spans": _spans(sample, end_of_text_id)} for sample in split["samples"]],
        "window_spans": [span for part in window for span in part],
        "raw_bytes": {
            name: any(RAW_BYTE.search(token["token"]) for token in tokens)
            for name, tokens in (("common", split["common_tokens"]), ("unused", split["unused_tokens"]["first"]))
        },
    }


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _spans(shown: dict[str, Any], end_of_text_id: int) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "text": text,
            "shade": "end" if token == end_of_text_id else f"s{number % SHADES}",
            "breaks": text.endswith("\\n"),  # how token_text shows a newline
        }
        for number, (token, text) in enumerate(zip(shown["ids"], shown["token_texts"], strict=True))
    ]


def _curve(points: list[list[int]]) -> dict[str, Any]:
    """Return the log-log curve of count against rank: the points of the line, the ticks, and what it shows in words."""
    last_rank, most = points[-1][0], points[0][1]
    middle_rank, middle = points[len(points) // 2]
    across = CURVE_WIDTH / max(math.log10(last_rank), 1)
    up = CURVE_HEIGHT / max(math.log10(most), 1)
    points_drawn = [(math.log10(rank) * across, CURVE_HEIGHT - math.log10(count) * up) for rank, count in points]
    return {
        "line": " ".join(f"{x:.2f},{y:.2f}" for x, y in points_drawn),
        "label": f"Token count by rank, with logarithmic axes: the most common token occurs {most:,} times, "
        f"the one of rank {middle_rank:,} {middle:,} times, that of rank {last_rank:,} {points[-1][1]:,} times",
        "ranks": [{"at": round(n * across, 2), "label": f"{10**n:,}"} for n in range(int(math.log10(last_rank)) + 1)],
        "counts": [
            {"at": round(CURVE_HEIGHT - n * up, 2), "label": f"{10**n:,}"} for n in range(int(math.log10(most)) + 1)
        ],
    }
