"""The curves of a report, as matplotlib figures.

A figure is drawn once, in the colours of a light page, and written twice: as PNG, and as SVG whose colours the page
can turn into its own (`COLOURS` says which colour is called what). Nothing here touches pyplot or its global state.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gpt2.report_compare import asked_as_published, benchmark_title, main_figure, other_text
from gpt2.report_format import fixed, percent, rate, short
from gpt2.report_run import Curve, Run

OURS, INK, MUTED, GRID = "#1d5fd1", "#1b1f25", "#5f6975", "#e2e5e9"
PUBLISHED = ("#b8500f", "#23824f", "#7a48c4", "#a3296f", "#0f7f8c")
"""in the order of the configuration's `published`, in every plot"""
COLOURS = {
    "ours": OURS,
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    **{f"published-{index}": colour for index, colour in enumerate(PUBLISHED)},
}
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
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "report",  # the same run draws the same bytes
}
WIDTH, HEIGHT = 5.4, 3.3  # inches; narrow, so that letters stay readable on a phone
BESIDE = 0.755  # right end of axes that have labels beside them
FEW = 40  # so many points or fewer are marked one by one
POINTS = 1000  # about what a plot can show; longer curves are thinned to it


@dataclass(frozen=True)
class Plot:
    name: str
    """plots/<name>.png"""
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, labelled at its right end."""

    value: float
    label: str
    colour: str


def draw(run: Run) -> list[Plot]:
    """All plots for which there is anything to draw."""
    with matplotlib.rc_context(STYLE):
        plots = [
            _loss(run),
            *(_benchmark(run, name) for name in run.benchmarks),
            _learning_rate(run),
            _gradient_norm(run),
            _throughput(run),
            _mfu(run),
        ]
    return [plot for plot in plots if plot is not None]


def thin(xs: Sequence[float], ys: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most about `points` of the points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(xs) <= points:
        return list(xs), list(ys)
    stretch = -(-2 * len(xs) // points)
    kept: set[int] = {0, len(xs) - 1}
    for start in range(0, len(xs), stretch):
        indices = range(start, min(start + stretch, len(xs)))
        kept.add(min(indices, key=ys.__getitem__))
        kept.add(max(indices, key=ys.__getitem__))
    return [xs[i] for i in sorted(kept)], [ys[i] for i in sorted(kept)]


# ------------------------------------------------------------------------------------------------------- the plots


def _loss(run: Run) -> Plot | None:
    val, train = run.curves["val/loss"], run.curves["train/loss"]
    if not val and not train:
        return None
    figure, axes = _figure(right=BESIDE)
    levels = _published(run, "val_loss", 3)
    if train:
        _line(axes, _tokens(run, train), train.values, OURS, alpha=0.3, width=0.8)
        _name_training(axes, run, train)
    if val:
        _line(axes, _tokens(run, val), val.values, OURS)
    last = val or train
    low, high, cut = _loss_window(run, [level.value for level in levels])
    axes.set_ylim(low, high)
    ours = Level(last.values[-1], f"this run\n{last.values[-1]:.3f}", OURS)
    _levels(axes, levels, ours)
    _token_axis(axes, run)
    axes.set_ylabel("nats a token")
    caption = "Loss on the validation text, in nats a token, over the tokens trained on."
    if val and train:
        caption = f"{caption} The faint line is the loss of the training batches."
    if levels and other_text(run):
        caption = f"{caption} The published lines are of other validation tokens and do not compare."
    if cut:
        caption = f"{caption} The curve starts at {last.values[0]:.2f}, above the plot."
    return _finished("validation_loss", "Validation loss" if val else "Training loss", caption, figure, axes)


def _name_training(axes: Axes, run: Run, curve: Curve) -> None:
    """Write what the faint line is above its middle, where a long curve leaves room."""
    if len(curve.steps) <= FEW:
        return
    middle = slice(int(0.40 * len(curve.steps)), int(0.60 * len(curve.steps)))
    height = max(curve.values[middle])
    at = (run.tokens_at(curve.steps[len(curve.steps) // 2]), height)
    axes.annotate(
        "training batches", at, (0, 5), "data", "offset points", color=OURS, alpha=0.75, fontsize=8, ha="center"
    )


def _published(run: Run, field: str, digits: int) -> list[Level]:
    """The published figures of one kind that compare, each entry in the colour it has in every plot."""
    return [
        Level(value, f"{published.name}\n{fixed(value, digits)}", colour)
        for published, colour in zip(run.report.published, cycle(PUBLISHED), strict=False)
        if (value := getattr(published, field)) is not None and published.note is None
    ]


def _loss_window(run: Run, levels: list[float]) -> tuple[float, float, bool]:
    """(lowest, highest, whether points lie above): the end of a long curve is what one wants to read, so its first
    steep part may leave the plot."""
    curve = run.curves["val/loss"] or run.curves["train/loss"]
    top, cut = max(curve.values), False
    if len(curve.steps) >= 12:
        late = [value for step, value in zip(*_points(curve), strict=True) if step >= 0.04 * curve.steps[-1]]
        if max(late) < top - 1.0:
            top, cut = max(late), True
    low, high = min([*curve.values, *levels]), max([top, *levels])
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin, cut


def _benchmark(run: Run, name: str) -> Plot | None:
    score = run.evaluate_facts.scores.get(name)
    scores = score.figures() if score else {}
    shown = next(
        (figure for figure in ("acc_norm", "acc", "centered") if run.curves[f"benchmark/{name}/{figure}"]), None
    )
    shown = shown or main_figure(scores)
    curve, final = run.curves[f"benchmark/{name}/{shown}"], scores.get(shown or "")
    levels = []
    if shown == "acc_norm" and asked_as_published(run, name):
        levels = _published(run, "hellaswag_acc_norm", 4)
    if not curve and (final is None or not levels):
        return None  # one number by itself is for the table
    figure, axes = _figure(right=BESIDE)
    chance = score.chance if score else run.benchmarks[name].chance
    if chance is not None and shown != "centered":
        levels.append(Level(chance, f"guessing\n{fixed(chance, 4)}", MUTED))
    if curve:
        _line(axes, _tokens(run, curve), curve.values, OURS)
    if final is not None:
        axes.plot(run.train_facts.tokens, final, "o", color=OURS, markersize=5, clip_on=False, zorder=4)
    end = final if final is not None else curve.values[-1]
    values = [*curve.values, end, *(level.value for level in levels)]
    margin = max(0.1 * (max(values) - min(values)), 0.01)  # noise of a few examples is not to fill the plot
    axes.set_ylim(min(values) - margin, max(values) + margin)
    _levels(axes, levels, Level(end, f"this run\n{fixed(end, 4)}", OURS))
    _token_axis(axes, run)
    title = f"{benchmark_title(run, name)} ({shown})"
    examples = score.examples if score else run.benchmarks[name].examples
    caption = f"Share of {examples:,} examples answered rightly, over the tokens trained on."
    if final is not None:
        caption = f"{caption} The dot is the finished model, scored by the evaluation stage."
    return _finished("benchmark_" + re.sub(r"[^A-Za-z0-9_-]", "_", name), title, caption, figure, axes)


def _learning_rate(run: Run) -> Plot | None:
    curve = run.curves["train/lr"]
    if not curve:
        return None
    figure, axes = _figure()
    _line(axes, *_points(curve), OURS)
    _step_axis(axes)
    axes.set_ylim(0, 1.12 * max(*curve.values, run.train.optim.max_lr))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    optim = run.train.optim
    shape = "a cosine" if optim.schedule == "cosine" else "a plateau and a linear decay"
    caption = (
        f"Warm-up over {optim.warmup_steps:,} steps to {rate(optim.max_lr)}, then {shape} down to {rate(optim.min_lr)}."
    )
    return _finished("learning_rate", "Learning rate", caption, figure, axes)


def _gradient_norm(run: Run) -> Plot | None:
    curve = run.curves["train/grad_norm"]
    if not curve:
        return None
    figure, axes = _figure()
    steps, values = _points(curve)
    _line(axes, steps, values, OURS, width=1.0)
    _step_axis(axes)
    if min(values) > 0 and max(values) > 3 * min(values):
        _log_scale(axes)
    caption = "Norm of the whole gradient at each logged step, before it is clipped."
    clip = run.train.optim.grad_clip
    if clip is not None:
        axes.axhline(clip, color=PUBLISHED[0], linewidth=1.0, dashes=(4, 3))
        axes.annotate(
            f"clipped to {clip:g}", (1, clip), (-2, 3), ("axes fraction", "data"), "offset points",
            color=PUBLISHED[0], ha="right", va="bottom",
        )  # fmt: skip
        above = sum(value > clip for value in values)
        caption = f"{caption} {above:,} of {len(values):,} logged steps were above {clip:g} and were scaled down to it."
    return _finished("gradient_norm", "Gradient norm", caption, figure, axes)


def _throughput(run: Run) -> Plot | None:
    median = run.train_facts.tokens_per_second
    return _from_zero(
        run.curves["train/tokens_per_second"],
        Level(median, f"median {short(median)} tokens/s", INK),
        short,
        ("throughput", "Throughput (tokens/s)", "Tokens trained on in a second, at each logged step."),
    )


def _mfu(run: Run) -> Plot | None:
    mfu = run.train_facts.mfu
    caption = "The share of the GPUs' peak that the model's own FLOPs make up, at each logged step."
    return _from_zero(
        run.curves["train/mfu"],
        None if mfu is None else Level(mfu, f"median step {percent(mfu)}", INK),
        lambda share: f"{100 * share:g} %",
        ("mfu", "Model FLOPs utilisation (MFU)", caption),
    )


def _from_zero(
    curve: Curve, median: Level | None, show: Callable[[float], str], words: tuple[str, str, str]
) -> Plot | None:
    """A curve over steps on an axis that starts at zero, with its median as a labelled line."""
    if not curve:
        return None
    figure, axes = _figure()
    _line(axes, *_points(curve), OURS, width=1.0)
    top = max([*curve.values, *([median.value] if median else [])])
    axes.set_ylim(0, 1.22 * top or 1)
    if median is not None:
        axes.axhline(median.value, color=median.colour, linewidth=0.9, dashes=(4, 3))
        axes.annotate(
            median.label, (1, top), (-2, 4), ("axes fraction", "data"), "offset points",
            color=median.colour, ha="right", va="bottom",
        )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    _step_axis(axes)
    name, title, caption = words
    return _finished(name, title, caption, figure, axes)


# --------------------------------------------------------------------------------------------------------- drawing


def _figure(right: float = 0.965) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.13, right=right, top=0.885, bottom=0.15)
    return figure, axes


def _finished(name: str, title: str, caption: str, figure: Figure, first: Axes) -> Plot:
    first.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=8)
    return Plot(name, title, caption, figure)


def _points(curve: Curve) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return curve.steps, curve.values


def _tokens(run: Run, curve: Curve) -> list[int]:
    return [run.tokens_at(step) for step in curve.steps]


def _line(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], colour: str, *, alpha: float = 1, width: float = 1.7
) -> None:
    marked = len(xs) <= FEW and alpha == 1
    axes.plot(
        *thin(xs, ys), color=colour, alpha=alpha, linewidth=width, solid_capstyle="round", solid_joinstyle="round",
        marker="o" if marked or len(xs) == 1 else None, markersize=3.2,
    )  # fmt: skip


def _token_axis(axes: Axes, run: Run) -> None:
    axes.set_xlim(0, run.train_facts.tokens)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("tokens trained on")
    axes.grid(axis="x", visible=False)


def _step_axis(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("optimizer steps")
    for each in axes.figure.axes:
        each.grid(axis="x", visible=False)


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with round numbers at its lines: 0.1, 0.2, 0.5, 1, 2, 5 ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _levels(axes: Axes, levels: list[Level], ours: Level) -> None:
    """Draw the lines to compare with, and label them and our curve's end at the right, none over another."""
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


def spread(centres: Sequence[float], heights: Sequence[float], gap: float = 0.02) -> list[float]:
    """Move boxes, given from the lowest to the highest, as little as needed for none to overlap and all to lie in
    [0, 1], where they fit at all."""
    placed: list[float] = []
    for centre, height in zip(centres, heights, strict=True):
        floor = placed[-1] + heights[len(placed) - 1] / 2 + gap if placed else 0.0
        placed.append(max(centre, floor + height / 2))
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling - heights[index] / 2)
        ceiling = placed[index] - heights[index] / 2 - gap
    return placed


# ---------------------------------------------------------------------------------------------------------- writing


def png(plot: Plot) -> bytes:
    """The plot on white, 2 pixels a point of a page."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        plot.figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def svg(plot: Plot) -> str:
    """The plot as an <svg> element for the inside of a page: no background, identifiers that are its own, the page's
    type, and colours as CSS variables named after `COLOURS`."""
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
