"""The plots of a report."""

from __future__ import annotations

import re
from collections.abc import Callable

import matplotlib
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt2.config.run import Published
from gpt2.report.benchmarks import figure_candidates, is_share, main_figure, title
from gpt2.report.compare import VAL_LOSS, compares, lines
from gpt2.report.drawing import (
    INK,
    LABELLED_RIGHT,
    MUTED,
    OURS,
    PUBLISHED,
    STYLE,
    Level,
    Plot,
    draw_levels,
    draw_line,
    finished,
    label_at_right,
    log_scale,
    new_figure,
    step_axis,
    token_axis,
    tokens_of,
)
from gpt2.report.format import fixed, percent, scientific, short
from gpt2.report.run import Curve, Run


def draw(run: Run) -> list[Plot]:
    """Every plot for which the run has data."""
    with matplotlib.rc_context(STYLE):
        benchmarks = [_benchmark(run, name) for name in run.benchmarks]
        others = [plot(run) for plot in (_learning_rate, _gradient_norm, _throughput, _mfu)]
        plots = [_loss(run), *benchmarks, *others]
    return [plot for plot in plots if plot is not None]


def _loss(run: Run) -> Plot | None:
    val, train = run.curves["val/loss"], run.curves["train/loss"]
    if not val and not train:
        return None
    figure, axes = new_figure(right=LABELLED_RIGHT)
    others = lines(run, VAL_LOSS)
    levels = _levels(others, 3)
    if train:
        draw_line(axes, tokens_of(run, train), train.values, OURS, alpha=0.3, linewidth=0.8, label="training batches")
    if val:
        draw_line(axes, tokens_of(run, val), val.values, OURS, label="validation")
        axes.legend(loc="upper right", frameon=False, fontsize=8)
    last = val or train
    low, high, cut = _loss_window(run, [level.value for level in levels])
    axes.set_ylim(low, high)
    draw_levels(axes, levels, Level(last.values[-1], f"this run\n{last.values[-1]:.3f}", OURS))
    token_axis(axes, run)
    axes.set_ylabel("nats per token")
    caption = "Validation loss in nats per token."
    if elsewhere := [each.name for _, each, _ in others if not compares(run, each, VAL_LOSS)]:
        caption = f"{caption} Not comparable, on other validation tokens: {', '.join(elsewhere)}."
    if cut:
        caption = f"{caption} The curve starts at {last.values[0]:.2f}, above the plotted range."
    return finished("validation_loss", "Validation loss" if val else "Training loss", caption, figure, axes)


def _levels(others: list[tuple[int, Published, float]], digits: int) -> list[Level]:
    """Horizontal lines of other models, each model in one colour in all plots."""
    return [
        Level(value, f"{each.name}\n{fixed(value, digits)}", PUBLISHED[index % len(PUBLISHED)])
        for index, each, value in others
    ]


def _loss_window(run: Run, levels: list[float]) -> tuple[float, float, bool]:
    """(lowest, highest, whether points lie above). The steep start of a long curve and the lowest 0.5 % of batches may
    exceed the plot, so that its end is readable."""
    curve, train = run.curves["val/loss"] or run.curves["train/loss"], run.curves["train/loss"].values
    top, cut = max(curve.values), False
    if len(curve.steps) >= 12:
        late = [value for step, value in zip(*curve, strict=True) if step >= 0.04 * curve.steps[-1]]
        if max(late) < top - 1.0:
            top, cut = max(late), True
    lowest_batches = [sorted(train)[len(train) // 200]] if train else []
    low, high = min([*curve.values, *levels, *lowest_batches]), max([top, *levels])
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin, cut


def _benchmark(run: Run, name: str) -> Plot | None:
    score = run.evaluate_facts.scores.get(name)
    scores = score.figures() if score else {}
    usual = (*figure_candidates(run, name), "acc_norm", "acc")  # training may have scored another than the final one
    shown = next((figure for figure in usual if run.curves[f"benchmark/{name}/{figure}"]), None)
    shown = shown or (main_figure(run, name, score) if score else None)
    curve, final = run.curves[f"benchmark/{name}/{shown}"], scores.get(shown or "")
    digits = 2 if shown == "perplexity" else 4
    levels = _levels([line for line in lines(run, name, shown or "") if compares(run, line[1], name)], digits)
    if not curve and (final is None or len(levels) < 2):
        return None  # the table shows one or two numbers better
    figure, axes = new_figure(right=LABELLED_RIGHT)
    chance = score.chance if score else run.benchmarks[name].chance
    if chance is not None and is_share(shown):
        levels.append(Level(chance, f"chance\n{fixed(chance, 4)}", MUTED))
    if curve:
        draw_line(axes, tokens_of(run, curve), curve.values, OURS)
    if final is not None:
        axes.plot(run.train_facts.tokens, final, "o", color=OURS, markersize=5, clip_on=False, zorder=4)
    end = final if final is not None else curve.values[-1]
    values = [*curve.values, end, *(level.value for level in levels)]
    margin = max(0.1 * (max(values) - min(values)), 0.01)  # a range that noise of a few examples does not fill
    axes.set_ylim(min(values) - margin, max(values) + margin)
    draw_levels(axes, levels, Level(end, f"this run\n{fixed(end, 4)}", OURS))
    token_axis(axes, run)
    heading = f"{title(run, name)} ({shown})"
    examples = score.examples if score else run.benchmarks[name].examples
    caption = f"Accuracy on {examples:,} examples." if is_share(shown) else f"{examples:,} examples scored."
    if final is not None:
        caption = f"{caption} Dot: the final model, scored by the evaluation stage."
    return finished("benchmark_" + re.sub(r"[^A-Za-z0-9_-]", "_", name), heading, caption, figure, axes)


def _learning_rate(run: Run) -> Plot | None:
    curve = run.curves["train/lr"]
    if not curve:
        return None
    figure, axes = new_figure()
    draw_line(axes, *curve, OURS)
    step_axis(axes)
    axes.set_ylim(0, 1.12 * max(*curve.values, run.train.optim.max_lr))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    optim = run.train.optim
    shape = "a cosine" if optim.schedule == "cosine" else "a plateau and a linear decay"
    peak, end = scientific(optim.max_lr), scientific(optim.min_lr)
    caption = f"Warm-up over {optim.warmup_steps:,} steps to {peak}, then {shape} down to {end}."
    return finished("learning_rate", "Learning rate", caption, figure, axes)


def _gradient_norm(run: Run) -> Plot | None:
    curve = run.curves["train/grad_norm"]
    if not curve:
        return None
    figure, axes = new_figure()
    values = curve.values
    draw_line(axes, *curve, OURS, linewidth=1.0)
    step_axis(axes)
    if min(values) > 0 and max(values) > 3 * min(values):
        log_scale(axes)
    caption = "Global gradient norm before clipping, at each logged step."
    clip = run.train.optim.grad_clip
    if clip is not None:
        axes.axhline(clip, color=PUBLISHED[0], linewidth=1.0, dashes=(4, 3))
        label_at_right(axes, clip, f"clipped to {clip:g}", PUBLISHED[0])
        above = sum(value > clip for value in values)
        caption = f"{caption} {above:,} of {len(values):,} logged steps exceeded {clip:g} and were clipped."
    return finished("gradient_norm", "Gradient norm", caption, figure, axes)


def _throughput(run: Run) -> Plot | None:
    curve, median = run.curves["train/tokens_per_second"], run.train_facts.tokens_per_second
    caption = "Tokens per second at each logged step."
    return _with_median("throughput", "Throughput (tokens/s)", caption, curve, median, short)


def _mfu(run: Run) -> Plot | None:
    caption = "Model FLOPs as a share of the GPUs' peak, at each logged step."
    title = "Model FLOPs utilisation (MFU)"
    return _with_median("mfu", title, caption, run.curves["train/mfu"], run.train_facts.mfu, percent)


def _with_median(
    name: str, title: str, caption: str, curve: Curve, median: float | None, show: Callable[[float], str]
) -> Plot | None:
    """A curve over steps on an axis from zero, with its median as a labelled line."""
    if not curve:
        return None
    figure, axes = new_figure()
    draw_line(axes, *curve, OURS, linewidth=1.0)
    top = max(*curve.values, median or 0)
    axes.set_ylim(0, 1.22 * top or 1)
    if median is not None:
        axes.axhline(median, color=INK, linewidth=0.9, dashes=(4, 3))
        label_at_right(axes, top, f"median {show(median)}", INK)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    step_axis(axes)
    return finished(name, title, caption, figure, axes)
