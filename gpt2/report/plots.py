"""The curves of a report, as matplotlib figures: what each plot shows."""

from __future__ import annotations

import re
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt2.config.run import Published
from gpt2.report.benchmarks import is_share, main_figure, standing_for, title
from gpt2.report.compare import VAL_LOSS, compares, lines
from gpt2.report.drawing import (
    BESIDE,
    FEW,
    INK,
    MUTED,
    OURS,
    PUBLISHED,
    STYLE,
    Level,
    Plot,
    draw_levels,
    draw_line,
    finished,
    log_scale,
    new_figure,
    points_of,
    step_axis,
    token_axis,
    tokens_of,
)
from gpt2.report.format import fixed, percent, rate, short
from gpt2.report.run import Curve, Run


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


def _loss(run: Run) -> Plot | None:
    val, train = run.curves["val/loss"], run.curves["train/loss"]
    if not val and not train:
        return None
    figure, axes = new_figure(right=BESIDE)
    others = lines(run, VAL_LOSS)
    levels = _levels(others, 3)
    if train:
        draw_line(axes, tokens_of(run, train), train.values, OURS, alpha=0.3, width=0.8)
    if val:
        draw_line(axes, tokens_of(run, val), val.values, OURS)
    last = val or train
    low, high, cut = _loss_window(run, [level.value for level in levels])
    axes.set_ylim(low, high)
    _name_training(axes, run)
    ours = Level(last.values[-1], f"this run\n{last.values[-1]:.3f}", OURS)
    draw_levels(axes, levels, ours)
    token_axis(axes, run)
    axes.set_ylabel("nats a token")
    caption = "Loss on the validation text, in nats a token, over the tokens trained on."
    if val and train:
        caption = f"{caption} The faint line is the loss of the training batches."
    if elsewhere := [each.name for _, each, _ in others if not compares(run, each, VAL_LOSS)]:
        caption = f"{caption} Of other validation tokens, and not to be compared: {', '.join(elsewhere)}."
    if cut:
        caption = f"{caption} The curve starts at {last.values[0]:.2f}, above the plot."
    return finished("validation_loss", "Validation loss" if val else "Training loss", caption, figure, axes)


def _name_training(axes: Axes, run: Run) -> None:
    """Write what the faint line is over its middle, where a long curve leaves room: above whatever is drawn there, or
    below it where that would leave the plot."""
    train, val = run.curves["train/loss"], run.curves["val/loss"]
    if len(train.steps) <= FEW:
        return
    end = run.train_facts.steps
    across = np.linspace(0.36 * end, 0.64 * end, 60)  # as wide as the words
    drawn = [value for step, value in zip(*points_of(train), strict=True) if across[0] <= step <= across[-1]]
    if val:
        drawn += np.interp(across, *points_of(val)).tolist()
    if not drawn:
        return
    bottom, top = axes.get_ylim()
    above = max(drawn) < top - 0.1 * (top - bottom)
    axes.annotate(
        "training batches", (run.tokens_at(end // 2), max(drawn) if above else min(drawn)), (0, 5 if above else -5),
        "data", "offset points", color=OURS, alpha=0.75, fontsize=8, ha="center", va="bottom" if above else "top",
    )  # fmt: skip


def _levels(others: list[tuple[int, Published, float]], digits: int) -> list[Level]:
    """Somebody else's figures as lines, each model in the colour it has in every plot."""
    return [
        Level(value, f"{each.name}\n{fixed(value, digits)}", PUBLISHED[index % len(PUBLISHED)])
        for index, each, value in others
    ]


def _loss_window(run: Run, levels: list[float]) -> tuple[float, float, bool]:
    """(lowest, highest, whether points lie above): the end of a long curve is what one wants to read, so its first
    steep part may leave the plot, and so may the luckiest batches."""
    curve, train = run.curves["val/loss"] or run.curves["train/loss"], run.curves["train/loss"].values
    top, cut = max(curve.values), False
    if len(curve.steps) >= 12:
        late = [value for step, value in zip(*points_of(curve), strict=True) if step >= 0.04 * curve.steps[-1]]
        if max(late) < top - 1.0:
            top, cut = max(late), True
    lucky = [sorted(train)[len(train) // 200]] if train else []
    low, high = min([*curve.values, *levels, *lucky]), max([top, *levels])
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin, cut


def _benchmark(run: Run, name: str) -> Plot | None:
    score = run.evaluate_facts.scores.get(name)
    scores = score.figures() if score else {}
    usual = (*standing_for(run, name), "acc_norm", "acc")  # training may have scored another than the final one
    shown = next((figure for figure in usual if run.curves[f"benchmark/{name}/{figure}"]), None)
    shown = shown or (main_figure(run, name, score) if score else None)
    curve, final = run.curves[f"benchmark/{name}/{shown}"], scores.get(shown or "")
    digits = 2 if shown == "perplexity" else 4
    levels = _levels([line for line in lines(run, name, shown or "") if compares(run, line[1], name)], digits)
    if not curve and (final is None or len(levels) < 2):
        return None  # one or two numbers by themselves are for the table
    figure, axes = new_figure(right=BESIDE)
    chance = score.chance if score else run.benchmarks[name].chance
    if chance is not None and is_share(shown):
        levels.append(Level(chance, f"guessing\n{fixed(chance, 4)}", MUTED))
    if curve:
        draw_line(axes, tokens_of(run, curve), curve.values, OURS)
    if final is not None:
        axes.plot(run.train_facts.tokens, final, "o", color=OURS, markersize=5, clip_on=False, zorder=4)
    end = final if final is not None else curve.values[-1]
    values = [*curve.values, end, *(level.value for level in levels)]
    margin = max(0.1 * (max(values) - min(values)), 0.01)  # noise of a few examples is not to fill the plot
    axes.set_ylim(min(values) - margin, max(values) + margin)
    draw_levels(axes, levels, Level(end, f"this run\n{fixed(end, 4)}", OURS))
    token_axis(axes, run)
    heading = f"{title(run, name)} ({shown})"
    examples = score.examples if score else run.benchmarks[name].examples
    what = f"Share of {examples:,} examples answered rightly" if is_share(shown) else f"{examples:,} examples scored"
    caption = f"{what}, over the tokens trained on."
    if final is not None:
        caption = f"{caption} The dot is the finished model, scored by the evaluation stage."
    return finished("benchmark_" + re.sub(r"[^A-Za-z0-9_-]", "_", name), heading, caption, figure, axes)


def _learning_rate(run: Run) -> Plot | None:
    curve = run.curves["train/lr"]
    if not curve:
        return None
    figure, axes = new_figure()
    draw_line(axes, *points_of(curve), OURS)
    step_axis(axes)
    axes.set_ylim(0, 1.12 * max(*curve.values, run.train.optim.max_lr))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    optim = run.train.optim
    shape = "a cosine" if optim.schedule == "cosine" else "a plateau and a linear decay"
    caption = (
        f"Warm-up over {optim.warmup_steps:,} steps to {rate(optim.max_lr)}, then {shape} down to {rate(optim.min_lr)}."
    )
    return finished("learning_rate", "Learning rate", caption, figure, axes)


def _gradient_norm(run: Run) -> Plot | None:
    curve = run.curves["train/grad_norm"]
    if not curve:
        return None
    figure, axes = new_figure()
    steps, values = points_of(curve)
    draw_line(axes, steps, values, OURS, width=1.0)
    step_axis(axes)
    if min(values) > 0 and max(values) > 3 * min(values):
        log_scale(axes)
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
    return finished("gradient_norm", "Gradient norm", caption, figure, axes)


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
        None if mfu is None else Level(mfu, f"median {percent(mfu)}", INK),
        lambda share: f"{100 * share:g} %",
        ("mfu", "Model FLOPs utilisation (MFU)", caption),
    )


def _from_zero(
    curve: Curve, median: Level | None, show: Callable[[float], str], words: tuple[str, str, str]
) -> Plot | None:
    """A curve over steps on an axis that starts at zero, with its median as a labelled line."""
    if not curve:
        return None
    figure, axes = new_figure()
    draw_line(axes, *points_of(curve), OURS, width=1.0)
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
    step_axis(axes)
    name, title, caption = words
    return finished(name, title, caption, figure, axes)
