from __future__ import annotations

import html
import re

import jinja2
import pytest
from matplotlib.textpath import TextPath

from lm.reports.page import COLORS, MARKERS, Bars, Panel, Scatter, chart, draw, render

pytestmark = pytest.mark.usefixtures("charts")


def test_a_drawing_has_its_titles_labels_and_no_date(read_page):
    panels = [Panel("a loss", {"one": [(1, 2.0), (2, 1.0)]}, {"two": [(2, 1.5)]}, {"best": 2})]
    svg = draw(panels, height=2)
    assert svg.startswith('<svg class="wide" ')
    assert svg == draw(panels, height=2)
    read_page(svg)
    for text in ("a loss", "one", "two", "best", "step"):
        assert f">{text}</text>" in svg
    assert 'role="img" aria-label="Chart of a loss by step: one, two, best"' in svg


def test_a_chart_is_drawn_once_in_a_row_and_once_stacked_for_phones(read_page):
    """The page shows one of the two; on a phone the second has text of the size of the page's small print."""
    panels = [
        Panel("first", {"one": [(1, 2.0)], "two": [(1, 1.0)]}),
        Panel("a second title, longer than a line " * 2, {}),
    ]
    wide, narrow = (f"<svg{part}" for part in chart(panels, height=2).split("<svg")[1:])
    assert wide == draw(panels, height=2)
    sizes = [[float(n) for n in re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups()] for svg in (wide, narrow)]
    assert (sizes[0][0], sizes[0][1]) == (648, 144)
    assert sizes[1][0] < 350
    assert sizes[1][1] == 2 * sizes[0][1]
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in (wide, narrow)]
    assert not set(ids[0]) & set(ids[1])
    assert 'class="narrow" role="img" aria-label="Chart of first by step: one, two; a second' in narrow
    ends = [float(n) for n in re.findall(r'<text [^>]*\bx="([\d.]+)"', narrow)]
    assert max(ends) < sizes[1][0]
    style = " ".join(render("page.html").split())
    assert "figure svg.narrow { display: none;" in style
    assert (
        "figure svg.wide { display: none; } figure svg.narrow { display: block; }"
        in style.partition("@media (max-width")[2]
    )


def test_a_drawing_takes_every_color_from_the_page():
    """So that it can be read on a dark screen too; what is outside of a page keeps the light ones."""
    series = {f"run {number}": [(0.0, 1.0), (1.0, 2.0)] for number in range(len(COLORS))}
    for panel in (Panel("a", series, {"b": [(0.5, 1.5)]}, {"c": 0.5}), Bars("a", {"x": (1.0, 0.1)}, "y")):
        colors = re.findall(r"(?:fill|stroke): (#\w+|var\([^)]*\))", draw([panel], height=2))
        assert colors
        assert {color for color in colors if color.startswith("#")} <= {"#000000"}  # of shapes that are not drawn
        style = render("page.html")
        assert all(f"{name}:" in style for name in re.findall(r"--[\w-]+", " ".join(colors)))


def test_each_series_keeps_its_color_where_others_are_empty():
    series = {f"run {number}": [(0.0, 1.0), (1.0, 2.0)] for number in range(len(COLORS) + 1)}
    svg = draw([Panel("all", series)], height=2)
    assert all(svg.count(color) > draw([Panel("none", {})], height=2).count(color) for color in COLORS)
    second = draw([Panel("one", {"first": [], "second": [(0.0, 1.0)]})], height=2)
    assert COLORS[1] in second
    assert COLORS[0] not in second


def test_bars_are_drawn_from_top_to_bottom_with_their_errors():
    svg = draw([Bars("a task", {"majority": (0.5, 0.0), "full": (0.8, 0.05)}, "accuracy")], height=2)
    assert svg.index(">majority<") < svg.index(">full<")
    assert ">accuracy<" in svg
    assert COLORS[1] not in svg


def test_baselines_have_another_color_and_single_values_no_error_bars():
    values = {"majority": (0.5, 0.0), "full": (0.98, 0.0)}
    svg = draw([Bars("", values, "accuracy", ("majority",), limit=1.0)], height=2)
    assert COLORS[0] in svg
    assert COLORS[1] in svg
    assert ">1.0</text>" in svg
    with_error = draw([Bars("", {**values, "full": (0.9, 0.01)}, "accuracy", ("majority",), limit=1.0)], height=2)
    assert with_error.count("<path") > svg.count("<path")


def test_points_are_told_apart_by_color_and_by_shape(read_page):
    names = [f"class {number}" for number in range(8)]
    scatter = Scatter("a map", {"": [(0.0, 0.0)]} | {name: [(1.0, 2.0), (2.0, 1.0)] for name in names}, "one", "two")
    svg = draw([scatter], height=3)
    read_page(svg)
    assert all(f">{name}</text>" in svg for name in (*names, "one", "two"))
    assert 'aria-label="Chart of a map, points of each: class 0 2, class 1 2' in svg
    shapes = re.findall(r'<path id="\w+" d="([^"]+)"', svg)
    assert len(set(shapes)) >= len(MARKERS)
    assert len(COLORS) != len(MARKERS)


def test_names_are_drawn_as_they_are():
    """Also where matplotlib would see mathematics, or hides the label."""
    for name in ("_hidden", "a <b> & c"):
        assert html.escape(name, quote=False) in draw([Panel("t", {name: [(0, 1)], "other": [(0, 2)]})], height=2)
    for panel in (Panel("$x$", {}), Panel("", {"$x$": [(0, 1)], "other": [(0, 2)]})):
        assert ">$x$</text>" in draw([panel], height=2)
    assert 'aria-label="Chart of &lt;b&gt; &quot; by step"' in draw([Panel('<b> "', {})], height=2)


def test_a_page_refuses_a_value_that_it_lacks():
    with pytest.raises(jinja2.UndefinedError):
        render("compare.html", names=["a", "b"])


def test_steps_are_told_in_thousands_and_shares_as_they_are():
    def ticks(most):
        return draw([Panel("t", {"": [(0.0, 1.0), (most, 2.0)]})], height=2)

    assert "k</text>" in ticks(4000.0)
    assert "m</text>" not in ticks(1.0)
    assert ">0.4</text>" in ticks(1.0)


def test_the_ticks_of_a_chart_fit_beside_its_axis():
    lines = {name: [(10, 7.0 + up), (60, 5.5 + up), (120, 4.0 + up)] for name, up in (("a", 0.0), ("b", 0.1))}
    points = {name: [(60, 4.5 + up), (120, 4.0 + up)] for name, up in (("c", 0.0), ("d", 0.1))}
    svg = draw([Panel("loss, nats per token", lines, points)], 3.6, stacked=True)
    ticks = re.findall(r'text-anchor: end[^>]*x="([\d.]+)"[^>]*>([\d.]+)<', svg)
    assert any("." in name for _, name in ticks)
    for right, name in ticks:
        assert float(right) >= TextPath((0, 0), name, size=10).get_extents().x1 - 1
