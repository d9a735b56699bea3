"""Common parts of the HTML pages: one style, and charts as inline SVG, so that a page needs no network."""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

Series = dict[str, list[tuple[float, float]]]

# The page's style has a second value of each color for dark screens, by these names.
COLORS = ("#b3471d", "#2b5d8c", "#5a7d2a", "#7a4b8c", "#b08a1e", "#3d8a86")
MARKERS = "os^Dv*P"  # one more than there are colors, so that each pair of both comes once in 42 names
LARGEST_PICTURE = 96  # pixels
INK, SOFT, LINE = "#1d2330", "#5b6477", "#dfe3ea"
NAMES = {INK: "ink", SOFT: "soft", LINE: "line", **{color: f"series-{n}" for n, color in enumerate(COLORS)}}


@dataclass(frozen=True)
class Panel:
    """One chart: named lines, named series of marked points, and named positions on the horizontal axis.

    The first line and the first series of points have the same color, and so on; an empty series counts too.
    """

    title: str
    lines: Series
    points: Series = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    horizontal: str = "step"


@dataclass(frozen=True)
class Bars:
    """One chart: a horizontal bar per name, from top to bottom, with its value and the half-width of its error bar.

    Bars named in ``baselines`` have another color. ``limit`` is where the axis ends; None: behind the longest bar.
    """

    title: str
    values: dict[str, tuple[float, float]]
    horizontal: str
    baselines: Collection[str] = ()
    limit: float | None = None


@dataclass(frozen=True)
class Scatter:
    """One chart: a point for each (x, y), the points of each name with a color and a marker of their own.

    The points named "" are drawn first, in gray. No axis has ticks: only distances count.
    """

    title: str
    points: Series
    horizontal: str
    vertical: str


@dataclass(frozen=True)
class Dots:
    """One chart: a dot for each (x, y), a thin ``line``, and the ``best`` dot with its name.

    ``ticks`` are the names of positions on the horizontal axis; empty: numbers. ``log``: its numbers vary by factors.
    """

    title: str
    points: list[tuple[float, float]]
    best: tuple[str, float, float]
    line: list[tuple[float, float]]
    horizontal: str
    ticks: dict[float, str]
    log: bool


Chart = Panel | Bars | Scatter | Dots


def picture(pixels: NDArray[np.uint8]) -> str:
    """Pixels, uint8 (height, width, 1 or 3), as the address of a PNG that an ``img`` shows, at most 96 pixels wide."""
    from PIL import Image

    made = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    made.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    made.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def render(template: str, **values: Any) -> str:
    """Render a page of ``templates``; values are escaped, and an undefined name is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return pages.get_template(template).render(**values)


def chart(panels: Sequence[Chart], height: float) -> str:
    """Draw panels twice, in a row for wide screens and stacked for phones; the page's style shows one of the two."""
    return draw(panels, height) + draw(panels, height, stacked=True)


def draw(panels: Sequence[Chart], height: float, *, stacked: bool = False) -> str:
    """Draw panels in a row, ``height`` inches high and 9 inches wide in total, as one SVG element without a date.

    Its texts are texts, its colors follow the page's, and a label says what it shows. ``stacked`` panels are below one
    another, 4.2 inches wide, with their legends below them.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.rcsetup import cycler

    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    kind = "narrow" if stacked else "wide"
    label = _label(panels)
    style |= {"svg.hashsalt": f"{kind} {label}", "svg.fonttype": "none", "axes.titlesize": 10}
    style |= {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "sans-serif"]}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(style | {"axes.edgecolor": SOFT, "axes.prop_cycle": cycler(color=COLORS)}):
        across = (len(panels), 1) if stacked else (1, len(panels))
        size = (4.2, min(height, 3.6) * len(panels)) if stacked else (9, height)
        layout = ConstrainedLayoutEngine()
        figure = Figure(figsize=size, layout=layout)
        figure.patch.set_alpha(0)
        for axes, panel in zip(figure.subplots(*across, squeeze=False).flat, panels, strict=True):
            match panel:
                case Bars():
                    _draw_bars(axes, panel)
                case Scatter():
                    _draw_scatter(axes, panel, stacked)
                case Dots():
                    _draw_dots(axes, panel)
                case Panel():
                    _draw_panel(axes, panel, stacked)
            axes.patch.set_alpha(0)
            axes.title.set_wrap(True)
            axes.xaxis.label.set_wrap(True)
        layout.execute(figure)  # ticks follow the size, so the first layout measured others than it drew
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub("|".join(NAMES), lambda color: f"var(--{NAMES[color[0]]}, {color[0]})", svg)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # of groups, the same in each chart of a page
    return svg.replace("<svg", f'<svg class="{kind}" role="img" aria-label="{html.escape(label)}"', 1)


def _label(panels: Sequence[Chart]) -> str:
    """What panels show, in words."""
    parts = []
    for panel in panels:
        if isinstance(panel, Bars):
            values = ", ".join(f"{name} {value:.3f}" for name, (value, _) in panel.values.items())
            parts.append(f"{panel.title or panel.horizontal}: {values}")
            continue
        if isinstance(panel, Scatter):
            counts = ", ".join(f"{name} {len(points)}" for name, points in panel.points.items() if name)
            parts.append(panel.title + (f", points of each: {counts}" if counts else ""))
            continue
        if isinstance(panel, Dots):
            name, x, y = panel.best
            parts.append(f"{panel.title} by {panel.horizontal}: {name}, {y:.4f} at {panel.ticks.get(x, f'{x:g}')}")
            continue
        names = [name for name in (*panel.lines, *panel.points, *panel.marks) if name]
        parts.append(f"{panel.title} by {panel.horizontal}" + (f": {', '.join(names)}" if names else ""))
    return "Chart of " + "; ".join(parts)


def _draw_panel(axes: Any, panel: Panel, stacked: bool) -> None:
    from matplotlib.ticker import EngFormatter

    marked = {"marker": "o", "markersize": 4, "linestyle": "--"}
    for kind, style in ((panel.lines, {"linewidth": 1.2}), (panel.points, marked)):
        for (label, series), color in zip(kind.items(), itertools.cycle(COLORS), strict=False):
            alone = {"marker": "o", "markersize": 4} if len(series) == 1 else {}  # a line of one point is invisible
            axes.plot(*zip(*series, strict=True), color=color, label=_literal(label), **style | alone)
    for label, position in panel.marks.items():
        axes.axvline(position, color=SOFT, linewidth=1, linestyle=":", label=_literal(label))
    axes.set(title=_literal(panel.title), xlabel=panel.horizontal)
    if axes.get_xlim()[1] > 10:  # steps: "k" for thousands; but no "m" for fractions
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=LINE, linewidth=0.6)
    if len(panel.lines) + len(panel.points) + len(panel.marks) > 1:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)} if stacked else {"loc": "best"}
        axes.legend(frameon=False, **place)


def _draw_bars(axes: Any, bars: Bars) -> None:
    values, errors = zip(*bars.values.values(), strict=True)
    positions = range(len(bars.values))
    colors = [COLORS[1] if name in bars.baselines else COLORS[0] for name in bars.values]
    axes.barh(positions, values, xerr=errors if any(errors) else None, height=0.6, color=colors, ecolor=INK, capsize=3)
    lowest = min(0.0, *(value - error for value, error in bars.values.values()))
    axes.set(title=_literal(bars.title), xlabel=_literal(bars.horizontal), xlim=(lowest, bars.limit))
    axes.set_yticks(positions, [_literal(name) for name in bars.values])
    axes.invert_yaxis()
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_scatter(axes: Any, scatter: Scatter, stacked: bool) -> None:
    style = {"linestyle": "none", "markersize": 5, "markeredgewidth": 0, "alpha": 0.85}
    if others := scatter.points.get(""):
        axes.plot(*zip(*others, strict=True), color=SOFT, marker=".", **style)
    named = {name: points for name, points in scatter.points.items() if name and points}
    for number, (name, points) in enumerate(named.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=_literal(name), **style)
    axes.set(title=_literal(scatter.title), xlabel=scatter.horizontal, ylabel=scatter.vertical, xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    if named:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 3, "columnspacing": 1}
        axes.legend(frameon=False, **(below if stacked else {"loc": "center left", "bbox_to_anchor": (1, 0.5)}))


def _draw_dots(axes: Any, dots: Dots) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    name, x, y = dots.best
    if dots.line:
        axes.plot(*zip(*dots.line, strict=True), color=SOFT, linewidth=1)
    axes.plot(*zip(*dots.points, strict=True), color=COLORS[1], marker="o", markersize=5, linestyle="none")
    axes.plot([x], [y], color=COLORS[0], marker="o", markersize=9, linestyle="none")
    is_lowest = y <= min(height for _, height in dots.points)  # then there is room below
    place = {"xytext": (0, -9 if is_lowest else 9), "va": "top" if is_lowest else "bottom", "ha": "center"}
    axes.annotate(_literal(name), (x, y), textcoords="offset points", color=COLORS[0], **place)
    axes.set(title=_literal(dots.title), xlabel=_literal(dots.horizontal), xscale="log" if dots.log else "linear")
    if dots.ticks:
        axes.set_xticks(list(dots.ticks), [_literal(tick) for tick in dots.ticks.values()])
        axes.xaxis.set_minor_locator(NullLocator())
    elif dots.log:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.margins(x=0.12, y=0.18)
    axes.grid(color=LINE, linewidth=0.6)


def _literal(text: str) -> str:
    """Escape text for matplotlib: no math between dollar signs, and no leading underscore, which hides a label."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
