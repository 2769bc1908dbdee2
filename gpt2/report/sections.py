"""The functions that report.md.jinja calls: tables and lists of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpt2.flops import flops_per_token
from gpt2.report.benchmarks import core_tasks, is_share, standard_error, title
from gpt2.report.compare import value_of
from gpt2.report.definitions import METRICS_SHOWN, definition
from gpt2.report.format import DASH, dollars, fixed, hours, plural, scientific, short
from gpt2.report.markdown import Markdown, code
from gpt2.report.run import Run, Sample
from gpt2.stage.facts import HarnessFacts

SAMPLES_SHOWN = 12
ANOMALIES_SHOWN = 50
SAME_LOSS = 0.002  # nats per token; training and evaluation may use different precisions


def results(run: Run) -> list[list[str]]:
    """Rows: label, target, result, published figures."""
    train, facts, evaluated, published = run.train, run.train_facts, run.evaluate_facts, run.published
    peak_lr = max(run.curves["train/lr"].values, default=None)

    def others(field: str, show: Callable[[Any], str]) -> list[str]:
        return [DASH if getattr(each, field) is None else show(getattr(each, field)) for each in published]

    tokens = train.max_steps * train.total_batch_size
    rows = [
        ["parameters", fixed(train.model.n_params()), fixed(facts.n_params)],
        ["optimizer steps", fixed(train.max_steps), fixed(facts.steps)],
        ["tokens per step", fixed(train.total_batch_size), fixed(facts.tokens / max(facts.steps, 1))],
        ["tokens", fixed(tokens), fixed(facts.tokens)],
        ["highest learning rate", scientific(train.optim.max_lr), scientific(peak_lr)],
    ]
    rows = [[*row, *[DASH] * len(published)] for row in rows]
    loss, on = "validation loss (nats per token)", f"on {short(run.evaluate.val_tokens)} tokens"
    rows.append([loss, on, fixed(evaluated.val_loss, 4), *others("val_loss", lambda value: fixed(value, 4))])
    for name, score in evaluated.scores.items():
        for figure, value in score.figures().items():
            digits = 2 if figure == "perplexity" else 4
            unit = f" per {score.unit}" if figure == "perplexity" and score.unit else ""
            error = f" ± {fixed(standard_error(value, score.examples), 4)}" if is_share(figure) else ""
            label, examples = f"{title(run, name)} {figure}{unit}", plural(score.examples, "example")
            theirs = [fixed(value_of(run, each, name, figure), digits) for each in published]
            rows.append([label, examples, fixed(value, digits) + error, *theirs])
    return [
        *rows,
        ["hours", DASH, hours(run.hours), *others("hours", hours)],
        ["devices", DASH, run.device, *others("gpus", str)],
        ["dollars", price(run), dollars(run.dollars), *others("dollars", dollars)],
    ]


def harness(facts: HarnessFacts) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of lm-evaluation-harness's figures, by its own names."""
    figures = facts.figures
    names = sorted({name for by_name in figures.values() for name in by_name})
    rows = [
        [task, fixed(facts.examples.get(task, 0)), *(fixed(by_name.get(name), 4) for name in names)]
        for task, by_name in figures.items()
    ]
    return ["task", "examples", *names], rows


def spaced(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly spaced, including the first and the last."""
    if len(samples) <= count:
        return list(samples)
    return [samples[round(index * (len(samples) - 1) / (count - 1))] for index in range(count)]


def irregularities(run: Run) -> list[str]:
    """One sentence per deviation from a normal run."""
    trained, evaluated = run.train_facts, run.evaluate_facts
    result: list[str] = [
        Markdown(f"{code(name)}: not finite at {plural(count, 'logged step')}, excluded from its curve.")
        for name, count in sorted(run.curves.nonfinite.items())
    ]
    result += [f"Input excluded: {each}" for each in skipped_input(run)]
    result += [f"{name} was not scored: {reason}" for name, reason in evaluated.skipped.items()]
    result += [
        f"{title(run, name)}: without {task} ({reason})."
        for name in evaluated.scores
        if core_tasks(run, name)
        for task, reason in run.benchmarks[name].left_out.items()
    ]
    if run.without_harness:
        result.append(f"lm-evaluation-harness did not run: {run.without_harness}")
    if evaluated.val_tokens == run.train.val.tokens and abs(evaluated.val_loss - trained.val_loss) > SAME_LOSS:
        result.append(
            f"Training measured a validation loss of {trained.val_loss:.4f} ({trained.precision}), evaluation "
            f"{evaluated.val_loss:.4f} ({evaluated.precision}), on the same tokens."
        )
    if evaluated.val_tokens < run.evaluate.val_tokens:
        wanted = f"evaluate.val_tokens is {run.evaluate.val_tokens:,}"
        result.append(f"The validation shards hold {evaluated.val_tokens:,} tokens to score; {wanted}.")
    result += [
        f"{name}: {plural(score.truncated, 'sequence')} longer than the context, truncated on the left."
        for name, score in evaluated.scores.items()
        if score.truncated
    ]
    return result


def anomalies(run: Run) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of anomalies.jsonl with one column per field."""
    shown = run.anomalies[:ANOMALIES_SHOWN]
    columns = [name for name in dict.fromkeys(key for line in shown for key in line) if name != "time"]
    rows = [[_cell(line.get(name)) for name in columns] for line in shown]
    if len(run.anomalies) > len(shown):
        rows.append([f"and {len(run.anomalies) - len(shown):,} more", *[""] * (len(columns) - 1)])
    return columns, rows


def _cell(value: Any) -> str:
    if value is None:
        return DASH
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def skipped_input(run: Run) -> list[str]:
    return [
        f"{each.file}{'' if each.row_group is None else f', row group {each.row_group}'}: "
        f"{plural(each.rows, 'row')}, {each.reason}."
        for each in run.tokenize_facts.skipped
    ]


def counts_as_llmc(run: Run) -> bool:
    """Whether the training stage counted FLOPs with llm.c's formula."""
    return math.isclose(run.train_facts.flops_per_token, flops_per_token(run.train.model), rel_tol=1e-9)


def shards(run: Run, split: str) -> int:
    return sum(entry.split == split for entry in run.tokenize_facts.shards)


def price(run: Run) -> str:
    return f"${run.report.dollars_per_gpu_hour:g} per GPU-hour" if run.report.dollars_per_gpu_hour else "no price given"


def gpus(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none"


def definitions(run: Run) -> list[list[str]]:
    figures = [name for score in run.evaluate_facts.scores.values() for name in score.figures()]
    return [[code(name), definition(name)] for name in dict.fromkeys([*METRICS_SHOWN, *figures])]
