"""``sweep.html``: the points of a sweep in a table, best first, and a chart of what each setting does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically
from lm.config.setting import spelled
from lm.config.sweep_axes import describe
from lm.evaluation.sweep import PAGE, TABLE
from lm.reports.page import Dots, chart, render

IN_A_ROW = 3  # charts
FEWEST_VALUES = 3  # of a setting, of which the best is said to be at the edge
MOST_TICKS = 6  # of a horizontal axis with a tick for each value
FACTOR = 8  # between the smallest and the largest value, from which an axis is logarithmic


def write_sweep(out: Path, table: dict[str, Any]) -> None:
    """Write ``table.json`` and ``sweep.html`` of a sweep (``lm.evaluation.sweep.Sweep.table``) into its folder."""
    write_atomically(out / TABLE, json.dumps(table, indent=1) + "\n")
    header, *lines = rows(table)
    points = [
        {"cells": cells, "runs": [(name, (out / name / "report.html").is_file()) for name in point["runs"]]}
        for cells, point in zip(lines, table["points"], strict=True)
    ]
    page = render(
        "sweep.html",
        name=out.resolve().name,
        lead=f"{table['recipe']}, {_count(table)}; compared by {table['unit']} at the last validation: "
        f"{table['better']} is better.",
        verdict=verdict(table),
        header=header,
        points=points,
        charts=charts(table),
        folder=str(out),
        is_search=table["trials"] > 0,
    )
    write_atomically(out / PAGE, page)


def rows(table: Mapping[str, Any]) -> list[list[str]]:
    """The table as texts: a header, then a row for each point, best first."""
    several = any(point["deviation"] is not None for point in table["points"])
    measure = table["unit"] + (" ± standard deviation" if several else "")
    lines = [["point", *table["settings"], measure, ""]]
    for point in table["points"]:
        number = "" if point["value"] is None else f"{point['value']:.4f}"
        number += "" if point["deviation"] is None else f" ± {point['deviation']:.4f}"
        remark = "" if point["status"] == "finished" else point["status"]
        remark += f": {point['note']}" if point["note"] else ""
        lines.append([f"{point['point']:03d}", *map(spelled, point["settings"].values()), number, remark])
    return lines


def verdict(table: Mapping[str, Any]) -> str:
    """Sentences about the best point: its settings, its value, and whether it is at the edge of what was tried."""
    finished = [point for point in table["points"] if point["status"] == "finished"]
    if not finished:
        return "No point has finished."
    best = finished[0]
    sentences = [
        f"Best: point {best['point']:03d} with {describe(best['settings'])}: {table['unit']} {best['value']:.4f}."
    ]
    listed = {} if table["trials"] else best["settings"]  # what a search drew has no edge
    for name, value in listed.items():
        tried = [point["settings"][name] for point in finished]
        if _are_numbers(tried) and value in (min(tried), max(tried)) and len(set(tried)) >= FEWEST_VALUES:
            which = ("smallest", "smaller") if value == min(tried) else ("largest", "larger")
            sentences.append(f"Its {name} is the {which[0]} that was tried: {which[1]} ones may be better.")
    return " ".join(sentences)


def charts(table: Mapping[str, Any]) -> list[str]:
    """A chart for each setting, as SVG: the points by its value, the best one named."""
    finished = [point for point in table["points"] if point["status"] == "finished"]
    if not finished:
        return []
    varied = [name for name in table["settings"] if len({spelled(point["settings"][name]) for point in finished}) > 1]
    panels = [_chart(table, finished, name) for name in varied or table["settings"][:1]]
    return [chart(panels[first : first + IN_A_ROW], height=3.2) for first in range(0, len(panels), IN_A_ROW)]


def _chart(table: Mapping[str, Any], finished: list[dict[str, Any]], name: str) -> Dots:
    """Few values have equal distances and a tick each; many are numbers on a scale."""
    given = [point["settings"][name] for point in finished]
    values = [spelled(value) for value in (sorted(set(given)) if _are_numbers(given) else sorted(given, key=spelled))]
    names = list(dict.fromkeys(values))
    few = len(names) <= MOST_TICKS or not _are_numbers(given)
    places = [float(names.index(spelled(value)) if few else value) for value in given]
    points = list(zip(places, [point["value"] for point in finished], strict=True))
    choose = max if table["better"] == "higher" else min
    best_of_each = [(x, choose(y for place, y in points if place == x)) for x in sorted(set(places))]
    return Dots(
        table["unit"],
        points,
        (f"best: {finished[0]['point']:03d}", *points[0]),
        best_of_each if _are_numbers(given) and not table["trials"] else [],
        name,
        dict(zip(map(float, range(len(names))), names, strict=True)) if few else {},
        not few and min(places) > 0 and max(places) / min(places) >= FACTOR,
    )


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _count(table: Mapping[str, Any]) -> str:
    states = [point["status"] for point in table["points"]]
    others = [f"{states.count(each)} {each}" for each in ("unfinished", "collapsed", "failed") if each in states]
    return f"{len(states)} point{'' if len(states) == 1 else 's'}" + (f" ({', '.join(others)})" if others else "")
