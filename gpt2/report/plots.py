"""The curves of a report, as matplotlib figures: what each plot shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt2.report.compare import asked_as_published, benchmark_title, main_figure, other_text
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
    levels = _published(run, "val_loss", 3)
    if train:
        draw_line(axes, tokens_of(run, train), train.values, OURS, alpha=0.3, width=0.8)
        _name_training(axes, run, train)
    if val:
        draw_line(axes, tokens_of(run, val), val.values, OURS)
    last = val or train
    low, high, cut = _loss_window(run, [level.value for level in levels])
    axes.set_ylim(low, high)
    ours = Level(last.values[-1], f"this run\n{last.values[-1]:.3f}", OURS)
    draw_levels(axes, levels, ours)
    token_axis(axes, run)
    axes.set_ylabel("nats a token")
    caption = "Loss on the validation text, in nats a token, over the tokens trained on."
    if val and train:
        caption = f"{caption} The faint line is the loss of the training batches."
    if levels and other_text(run):
        caption = f"{caption} The published lines are of other validation tokens and do not compare."
    if cut:
        caption = f"{caption} The curve starts at {last.values[0]:.2f}, above the plot."
    return finished("validation_loss", "Validation loss" if val else "Training loss", caption, figure, axes)


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
        for published, colour in zip(run.published, cycle(PUBLISHED), strict=False)
        if (value := getattr(published, field)) is not None and published.note is None
    ]


def _loss_window(run: Run, levels: list[float]) -> tuple[float, float, bool]:
    """(lowest, highest, whether points lie above): the end of a long curve is what one wants to read, so its first
    steep part may leave the plot."""
    curve = run.curves["val/loss"] or run.curves["train/loss"]
    top, cut = max(curve.values), False
    if len(curve.steps) >= 12:
        late = [value for step, value in zip(*points_of(curve), strict=True) if step >= 0.04 * curve.steps[-1]]
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
    figure, axes = new_figure(right=BESIDE)
    chance = score.chance if score else run.benchmarks[name].chance
    if chance is not None and shown != "centered":
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
    title = f"{benchmark_title(run, name)} ({shown})"
    examples = score.examples if score else run.benchmarks[name].examples
    caption = f"Share of {examples:,} examples answered rightly, over the tokens trained on."
    if final is not None:
        caption = f"{caption} The dot is the finished model, scored by the evaluation stage."
    return finished("benchmark_" + re.sub(r"[^A-Za-z0-9_-]", "_", name), title, caption, figure, axes)


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
