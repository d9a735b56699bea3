from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from lm.reports import sweep_report
from lm.reports.sweep_report import rows, verdict, write_sweep

pytestmark = pytest.mark.usefixtures("charts")


def point(number: int, value: float | None, status: str = "finished", note: str = "", **settings: Any) -> dict:
    return {
        "point": number,
        "runs": [f"{number:03d}"],
        "settings": settings,
        "value": value,
        "deviation": None,
        "status": status,
        "note": note,
    }


def table_of(*points: dict, **changes: Any) -> dict:
    names = list(points[0]["settings"])
    usual = {"recipe": "tiny", "measure": "bits_per_byte", "unit": "bits per byte", "better": "lower", "trials": 0}
    return {**usual, "settings": names, "points": list(points), **changes}


TABLE = table_of(
    point(2, 1.5, learning_rate=0.03, optimizer="muon"),
    point(1, 2.0, learning_rate=0.01, optimizer="adamw"),
    point(3, 2.25, learning_rate=0.003, optimizer="muon"),
    point(4, None, "failed", "the <loss> is not finite", learning_rate=3.0, optimizer="muon"),
)


def charts(table) -> list[str]:
    """The charts for wide screens, without those for phones."""
    return [drawn[: drawn.index("<svg", 1)] for drawn in sweep_report.charts(table)]


def test_the_page_has_every_point_the_best_one_first_and_named(tmp_path, read_page):
    (tmp_path / "002").mkdir()
    (tmp_path / "002" / "report.html").touch()
    write_sweep(tmp_path, TABLE)
    assert json.loads((tmp_path / "table.json").read_text()) == TABLE
    html = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    page = read_page(html)
    words = page.words()
    assert f"{tmp_path.name}: a sweep" in words
    assert "tiny, 4 points (1 failed); compared by bits per byte at the last validation: lower is better." in words
    assert "Best: point 002 with learning_rate 0.03, optimizer muon: bits per byte 1.5000." in words
    assert words.index("1.5000 ") < words.index("2.0000") < words.index("2.2500") < words.index("failed: the <loss>")
    assert [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")] == ["002/report.html"]
    assert page.tags.count("svg") == 2
    assert 'aria-label="Chart of bits per byte by learning_rate: best: 002, 1.5000 at 0.03; bits per byte by' in html
    assert re.search(r">best: 002</text>", html)
    assert re.search(r">adamw</text>.*>muon</text>", html, re.DOTALL)


def test_the_table_shows_deviations_over_seeds_and_why_a_point_has_no_value():
    several = table_of({**point(1, 1.0, data=["a", "b"]), "deviation": 0.125}, point(2, None, "unfinished", data=["c"]))
    assert rows(several) == [
        ["point", "data", "bits per byte ± standard deviation", ""],
        ["001", "a, b", "1.0000 ± 0.1250", ""],
        ["002", "c", "", "unfinished"],
    ]
    assert rows(TABLE)[4][-2:] == ["", "failed: the <loss> is not finite"]


@pytest.mark.parametrize(
    ("tried", "sentence"),
    [
        ((0.3, 0.1, 0.2), "Its beta1 is the largest that was tried: larger ones may be better."),
        ((0.1, 0.2, 0.3), "Its beta1 is the smallest that was tried: smaller ones may be better."),
        ((0.2, 0.1, 0.3), ""),
        ((0.2, 0.1), ""),
    ],
)
def test_a_best_point_at_the_edge_of_what_was_tried_is_reported(tried, sentence):
    table = table_of(*(point(n, float(n), beta1=value) for n, value in enumerate(tried, 1)))
    assert verdict(table) == f"Best: point 001 with beta1 {tried[0]}: bits per byte 1.0000. {sentence}".strip()
    assert verdict(table | {"trials": 3}).endswith("1.0000.")


def test_without_a_point_that_finished_there_is_no_chart(tmp_path, read_page):
    table = table_of(point(1, None, "failed", "no memory", learning_rate=0.1))
    assert (charts(table), verdict(table)) == ([], "No point has finished.")
    write_sweep(tmp_path, table)
    assert "failed: no memory" in read_page((tmp_path / "sweep.html").read_text(encoding="utf-8")).words()


def dots(svg: str) -> list[float]:
    """The horizontal positions of all dots but the best one, in the order in which they are drawn."""
    return [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill: var\(--series-1', svg)]


def test_few_values_have_equal_distances_and_a_tick_each():
    rates = (0.5, 0.1, 0.4)
    (svg,) = charts(table_of(*(point(n, float(n), learning_rate=rate, beta1=0.9) for n, rate in enumerate(rates, 1))))
    right, left, middle = dots(svg)
    assert middle - left == pytest.approx(right - middle, rel=1e-3)
    assert svg.index(">0.1</text>") < svg.index(">0.4</text>") < svg.index(">0.5</text>")
    assert "beta1" not in svg


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_line_joins_the_best_at_each_value(better):
    several = [point(n, value, beta1=(0.1, 0.2)[n % 2]) for n, value in enumerate((1.0, 2.0, 4.0, 6.0), 1)]
    (svg,) = charts(table_of(*sorted(several, key=lambda p: p["value"], reverse=better == "higher"), better=better))
    heights = [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)"[^>]*fill: var\(--series-1', svg)]
    line = re.search(r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ ([\d.]+) \n" clip-path[^>]*stroke: var\(--soft', svg)
    assert line
    ends = sorted(heights, reverse=better == "lower")[:2]  # an SVG counts from the top
    assert sorted(map(float, line.groups())) == pytest.approx(sorted(ends), abs=1e-3)


@pytest.mark.parametrize(("rate", "log"), [(lambda n: 2.0**-n, True), (lambda n: 1 + n / 10, False)])
def test_many_numbers_are_on_a_scale_by_factors_if_they_vary_by_factors(rate, log):
    (svg,) = charts(table_of(*(point(n, float(n), learning_rate=rate(n)) for n in range(8)), trials=8))
    places = dots(svg)
    gaps = [abs(b - a) for a, b in itertools.pairwise(places)]
    assert len(gaps) == 7
    assert gaps == pytest.approx([gaps[0]] * 7, rel=1e-3)
    ticks = re.findall(r">([\d.]+)</text>", svg)
    assert ("0.01" in ticks) == log


def test_the_charts_of_many_settings_are_in_several_rows():
    names = ("beta1", "beta2", "momentum", "dropout")
    drawn = charts(table_of(*(point(n, float(n), **dict.fromkeys(names, n / 10)) for n in (1, 2))))
    assert [svg.count(">bits per byte</text>") for svg in drawn] == [3, 1]
