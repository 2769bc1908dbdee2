"""The headline of a report: its numbers by name, its tiles, and its first paragraph."""

from __future__ import annotations

import math

from gpt2.report.benchmarks import at_chance, is_share, main_figure, standard_error, task, title
from gpt2.report.compare import VAL_LOSS, reference
from gpt2.report.format import dollars, duration, fixed, percent, plural, short, significant
from gpt2.report.run import Run
from gpt2.stage.facts import Score


def headline(run: Run) -> dict[str, float | str | None]:
    """The headline numbers by name, for the manifest, Prefect and MLflow."""
    facts = run.train_facts
    return {
        "val_loss": run.evaluate_facts.val_loss,
        "train_loss": facts.train_loss,
        **{
            f"{name}/{figure}": value
            for name, score in run.evaluate_facts.scores.items()
            for figure, value in score.figures().items()
        },
        "n_params": facts.n_params,
        "steps": facts.steps,
        "tokens": facts.tokens,
        "flops": run.flops,
        "tokens_per_second": facts.tokens_per_second,
        "mfu": facts.mfu,
        "hours": run.hours,
        "gpu_hours": run.gpu_hours,
        "dollars": run.dollars,
        "device": facts.device,
    }


def lead(run: Run) -> str:
    """Training and validation loss in two sentences."""
    facts, evaluated = run.train_facts, run.evaluate_facts
    start = "from random weights" if run.train.init_from is None else f"from the weights of {run.train.init_from}"
    cost = f": {significant(run.gpu_hours)} GPU-hours" if run.gpu_hours is not None else ""
    cost += f", {dollars(run.dollars)}" if run.dollars is not None else ""
    source = run.download_facts.origin.partition("@")[0]
    return (
        f"A GPT-2 with {short(facts.n_params, 4)} parameters was trained {start} on {short(facts.tokens)} tokens of "
        f"{source} ({_epochs(run)}) in {duration(facts.total_seconds)} on {run.device}{cost}. "
        f"Its loss on {fixed(evaluated.val_tokens)} validation tokens is {fixed(evaluated.val_loss, 4)} nats per token "
        f"(perplexity {fixed(perplexity(evaluated.val_loss), 1)}){_difference(run)}."
    )


def accuracies(run: Run) -> list[str]:
    """One sentence per benchmark whose main figure is an accuracy."""
    figures = {name: main_figure(run, name, score) for name, score in run.evaluate_facts.scores.items()}
    return [
        _accuracy(run, name, run.evaluate_facts.scores[name], figure)
        for name, figure in figures.items()
        if figure is not None and is_share(figure)
    ]


def _accuracy(run: Run, name: str, score: Score, figure: str) -> str:
    accuracy, other = score.figures()[figure], reference(run, name, figure)
    error = percent(standard_error(accuracy, score.examples))
    parts = [f"{percent(accuracy)} (± {error}) of {plural(score.examples, 'example')} correct"]
    if score.chance is not None:
        chance = percent(score.chance)
        above = f"chance is {chance}"
        parts.append(f"not significantly above chance ({chance})" if at_chance(accuracy, score) else above)
    if other is not None:
        parts.append(f"{other[0].name} reaches {percent(other[1])}")
    return f"{title(run, name)}{task(run, name)}: {'; '.join(parts)}."


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 50 else math.inf


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, note) of each headline number."""
    facts, loss = run.train_facts, reference(run, VAL_LOSS)
    note = f"{loss[0].name}: {loss[1]:.4f}" if loss else "nats per token"
    result = [("validation loss", fixed(run.evaluate_facts.val_loss, 4), note)]
    for name, score in run.evaluate_facts.scores.items():
        figure = main_figure(run, name, score)
        if figure is not None:
            value = fixed(score.figures()[figure], 2 if figure == "perplexity" else 4)
            result.append((title(run, name), value, _note(run, name, score, figure)))
    result += [
        ("tokens", short(facts.tokens), plural(facts.steps, "step")),
        ("training time", duration(facts.total_seconds), run.device),
    ]
    if run.gpu_hours is not None and run.dollars is not None:
        note = f"{significant(run.gpu_hours)} GPU-hours at ${run.report.dollars_per_gpu_hour:g}"
        result.append(("cost", dollars(run.dollars), note))
    elif run.gpu_hours is not None:
        result.append(("GPU-hours", significant(run.gpu_hours), "no price given"))
    mfu = f"{percent(facts.mfu)} MFU" if facts.mfu is not None else "median over logged lines"
    return [*result, ("tokens/s", short(facts.tokens_per_second), mfu)]


def _note(run: Run, name: str, score: Score, figure: str) -> str:
    """Standard error, chance level and reference of a benchmark's figure."""
    value, other = score.figures()[figure], reference(run, name, figure)
    if is_share(figure):
        parts = [f"± {standard_error(value, score.examples):.4f}"]
    else:
        parts = [f"{figure} per {score.unit}" if figure == "perplexity" and score.unit else figure]
    if is_share(figure) and at_chance(value, score):
        parts.append(f"not significantly above chance ({fixed(score.chance, 4)})")
    elif other is None and score.chance is not None:
        parts.append(f"chance: {score.chance:.4f}")
    if other is not None:
        parts.append(f"{other[0].name}: {fixed(other[1], 2 if figure == 'perplexity' else 4)}")
    return "; ".join(parts)


def _epochs(run: Run) -> str:
    return "1 epoch" if 0.995 <= run.epochs < 1.005 else f"{fixed(run.epochs, 2)} epochs"


def _difference(run: Run) -> str:
    published = reference(run, VAL_LOSS)
    if published is None:
        return ""
    difference = run.evaluate_facts.val_loss - published[1]
    direction = "below" if difference < 0 else "above"
    return f", {fixed(abs(difference), 3)} {direction} {published[0].name} ({published[1]:.4f})"
