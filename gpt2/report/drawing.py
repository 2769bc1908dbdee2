"""Style, axes, labels and files of the plots.

A figure is drawn once in light colours and written twice: as PNG, and as SVG with colours as CSS variables (`COLOURS`).
pyplot and its global state are not used.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gpt2.report.format import fixed, short
from gpt2.report.run import Curve, Run

OURS, INK, MUTED, GRID = "#1d5fd1", "#1b1f25", "#5f6975", "#e2e5e9"
PUBLISHED = ("#b8500f", "#23824f", "#7a48c4", "#a3296f", "#0f7f8c")
"""in the order of the configuration's `published`"""
COLOURS = {"ours": OURS, "ink": INK, "muted": MUTED, "grid": GRID}
COLOURS |= {f"published-{index}": colour for index, colour in enumerate(PUBLISHED)}
STYLE: dict[Any, Any] = {  # Any: matplotlib types its keys one by one
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.parse_math": False,  # a name may hold a dollar sign
    "path.simplify_threshold": 1.0,  # pixels; bounds the size of an SVG for any number of points, and keeps spikes
    "svg.fonttype": "none",  # text stays searchable
    "svg.hashsalt": "report",  # same run, same bytes
}
WIDTH, HEIGHT = 5.4, 3.3  # inches; narrow, for readable text on a phone
LABELLED_RIGHT = 0.755  # right end of axes with labels at the right
FEW = 40  # up to this many points have markers


@dataclass(frozen=True)
class Plot:
    name: str  # of plots/<name>.png
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Level:
    """A horizontal line, labelled at its right end."""

    value: float
    label: str
    colour: str


def new_figure(right: float = 0.965) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.13, right=right, top=0.885, bottom=0.15)
    return figure, axes


def finished(name: str, title: str, caption: str, figure: Figure, first: Axes) -> Plot:
    first.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=8)
    return Plot(name, title, caption, figure)


def tokens_of(run: Run, curve: Curve) -> list[int]:
    return [run.tokens_at(step) for step in curve.steps]


def draw_line(axes: Axes, xs: Sequence[float], ys: Sequence[float], colour: str, **style: Any) -> None:
    """A line with round joins; markers where it has few points."""
    marked = len(xs) <= FEW and "alpha" not in style
    style = {"linewidth": 1.7, "solid_capstyle": "round", "solid_joinstyle": "round", "markersize": 3.2, **style}
    axes.plot(xs, ys, color=colour, marker="o" if marked or len(xs) == 1 else None, **style)


def token_axis(axes: Axes, run: Run) -> None:
    axes.set_xlim(0, run.train_facts.tokens)
    _x_axis(axes, "training tokens", short)


def step_axis(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.margins(x=0.01)
    _x_axis(axes, "optimizer steps", fixed)


def _x_axis(axes: Axes, label: str, show: Callable[[float], str]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.set_xlabel(label)
    axes.grid(axis="x", visible=False)


def log_scale(axes: Axes) -> None:
    """Logarithmic, with ticks at 0.1, 0.2, 0.5, 1, 2, 5 ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def draw_levels(axes: Axes, levels: list[Level], ours: Level) -> None:
    """Draws the lines, and labels them and the end of this run's curve at the right without overlap."""
    for level in levels:
        axes.axhline(level.value, color=level.colour, linewidth=1.1, dashes=(4, 3), zorder=1.5)
    labelled = sorted([*levels, ours], key=lambda level: level.value)
    texts = ["\n".join(textwrap.fill(part, 19) for part in level.label.split("\n")) for level in labelled]
    bottom, top = axes.get_ylim()
    line = 8 * 1.25 / 72 / (axes.get_position().height * HEIGHT)  # height of a line of 8 points, as a share of the axes
    heights = [line * (text.count("\n") + 1) for text in texts]
    wanted = [(level.value - bottom) / (top - bottom) for level in labelled]
    for level, text, at, placed in zip(labelled, texts, wanted, spread(wanted, heights), strict=True):
        axes.plot(
            [1.0, 1.035], [at, placed], transform=axes.transAxes, color=level.colour, linewidth=0.8, clip_on=False
        )
        axes.text(
            1.05, placed, text, transform=axes.transAxes, color=level.colour, fontsize=8, va="center",
            linespacing=1.15, fontweight="bold" if level is ours else "normal",
        )  # fmt: skip


def label_at_right(axes: Axes, y: float, text: str, colour: str) -> None:
    """Writes `text` above the height `y`, at the right end of the axes."""
    at: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "ha": "right",
        "va": "bottom",
    }
    axes.annotate(text, (1, y), (-2, 3), color=colour, **at)


def spread(centres: Sequence[float], heights: Sequence[float], gap: float = 0.02) -> list[float]:
    """Moves boxes, sorted by centre, so that they do not overlap and lie in [0, 1] if they fit."""
    placed: list[float] = []
    for centre, height in zip(centres, heights, strict=True):
        floor = placed[-1] + heights[len(placed) - 1] / 2 + gap if placed else 0.0
        placed.append(max(centre, floor + height / 2))
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling - heights[index] / 2)
        ceiling = placed[index] - heights[index] / 2 - gap
    return placed


def png(plot: Plot) -> bytes:
    """The plot on white, 200 pixels per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        plot.figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def svg(plot: Plot) -> str:
    """The plot as an <svg> element: transparent, with unique identifiers, the page's font and colours as CSS variables
    named after `COLOURS`."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        plot.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r"\bid=\"", f'id="{plot.name}-', text)
    text = re.sub(r"url\(#", f"url(#{plot.name}-", text)
    text = re.sub(r"(?:xlink:)?href=\"#", f'href="#{plot.name}-', text)
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
