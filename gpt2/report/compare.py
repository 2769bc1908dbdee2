"""Compares a run's figures with measured baselines and published figures."""

from __future__ import annotations

from gpt2.config.run import Published
from gpt2.report.benchmarks import core_tasks, prompt, title
from gpt2.report.markdown import Markdown, codes, escape
from gpt2.report.reproduce import departures
from gpt2.report.run import Measured, Run
from gpt2.stage.facts import Score

HELLASWAG_EXAMPLES = 10_042  # validation set, as in published figures
TRAINING = tuple(
    f"train.{field}"
    for field in ("model", "optim", "total_batch_size", "max_steps", "shuffle", "align_documents", "init_from")
)
"""fields that determine the quality of the model"""
VAL_LOSS = "val_loss"
_OPENAI = {"openaigpt2": "124m", "openaigpt2medium": "350m", "openaigpt2large": "774m", "openaigpt2xl": "1558m"}
"""baseline name -> size in the names of published figures"""


def has_published_prompt(run: Run, name: str) -> bool:
    """Whether a benchmark is HellaSwag with the prompt of the published figures."""
    return run.benchmarks[name].kind == "hellaswag" and prompt(run, name) in ("", "llm.c")


def validation_departures(run: Run) -> list[str]:
    """Fields that differ from the recipe and change the validation tokens."""
    return [field for field in departures(run) if field.startswith(("download.", "tokenize.", "evaluate.val_tokens"))]


def value_of(run: Run, other: Published, name: str, figure: str = "") -> float | None:
    """Another model's value for a benchmark's figure, or for `VAL_LOSS`; None where unknown."""
    if name == VAL_LOSS:
        return other.val_loss
    if isinstance(other, Measured):
        score = other.scores.get(name)
        return score.figures().get(figure) if score else None
    if figure == "acc_norm" and has_published_prompt(run, name):
        return other.hellaswag_acc_norm
    if figure == "centered" and run.benchmarks[name].kind == "core":
        return other.core
    return None


def compares(run: Run, other: Published, name: str) -> bool:
    """Whether another model's figure is over the same tokens or examples; a measured one always is."""
    if isinstance(other, Measured):
        return True
    if other.note is not None:
        return False
    return not validation_departures(run) if name == VAL_LOSS else core_tasks(run, name) is None


def reference(run: Run, name: str, figure: str = "") -> tuple[Published, float] | None:
    """The comparable figure to name first: measured, else OpenAI's, else the first published; None without one."""
    comparable = [
        (each, value)
        for each in run.published
        if (value := value_of(run, each, name, figure)) is not None and compares(run, each, name)
    ]
    comparable.sort(key=lambda pair: (not isinstance(pair[0], Measured), "GPT-2" not in pair[0].name))
    return comparable[0] if comparable else None


def lines(run: Run, name: str, figure: str = "") -> list[tuple[int, Published, float]]:
    """(index in `run.published`, model, value) per line of a plot; a measured model replaces its published figures."""
    known = [
        (index, each, value)
        for index, each in enumerate(run.published)
        if (value := value_of(run, each, name, figure)) is not None and each.note is None
    ]
    measured = [each for _, each, _ in known if isinstance(each, Measured)]
    return [line for line in known if line[1] in measured or not any(_same_model(each, line[1]) for each in measured)]


def _same_model(measured: Measured, quoted: Published) -> bool:
    baseline, name = _plain(measured.name.removesuffix(" (measured)")), _plain(quoted.name)
    return name in (baseline, f"openaigpt2{_OPENAI.get(baseline, ' ')}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def notes(run: Run) -> list[str]:
    """Sources of the other figures, and why some are not comparable."""
    quoted = run.report.published
    result: list[str] = [
        f"{each.name}: {each.source}." + (f" Not comparable: {each.note}." if each.note else "")
        for each in run.published
    ]
    if run.evaluate_facts.scores:
        result.append("± is one standard error of a share p of n examples, sqrt(p (1 - p) / n).")
    if not quoted:
        return result
    departed, losses = validation_departures(run), [each.name for each in quoted if each.val_loss is not None]
    if departed and losses:
        result.append(
            Markdown(
                f"Not comparable: the published validation losses of {escape(', '.join(losses))}. The validation "
                f"tokens of this run differ from the recipe's: {codes(departed)}."
            )
        )
    trained = [field for field in departures(run) if field.startswith(TRAINING)]
    if trained:
        result.append(
            Markdown(f"The published figures belong to the unchanged recipe; this run changed {codes(trained)}.")
        )
    for name, score in run.evaluate_facts.scores.items():
        result += _benchmark_notes(run, name, score)
    if any(each.dollars is not None for each in quoted):
        result.append("Dollars depend on the hourly price; the published ones use the price of their time.")
    return result


def _benchmark_notes(run: Run, name: str, score: Score) -> list[str]:
    """Differences from the benchmark of the published figures."""
    kind, quoted = run.benchmarks[name].kind, run.report.published
    if kind == "core" and any(each.core is not None for each in quoted) and (tasks := core_tasks(run, name)):
        return [f"Not comparable: the published CORE covers all {tasks[1]} tasks; this run scored {tasks[0]}."]
    if kind != "hellaswag" or all(each.hellaswag_acc_norm is None for each in quoted):
        return []
    if not has_published_prompt(run, name):
        return [f"Not comparable with published figures: {title(run, name)} uses another prompt ({prompt(run, name)})."]
    if score.examples != HELLASWAG_EXAMPLES:
        return [f"HellaSwag: {score.examples:,} examples in this run, {HELLASWAG_EXAMPLES:,} in the published figures."]
    return []
