"""Our figures beside somebody else's: which of theirs belongs to which of ours, and what is not to be compared."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2.config.run import Published
from gpt2.report.benchmarks import core_tasks, prompt, title
from gpt2.report.document import Code, Text
from gpt2.report.reproduce import departures
from gpt2.report.run import Measured, Run
from gpt2.stage.facts import Score

HELLASWAG_EXAMPLES = 10_042  # of the validation set, which published figures are over
TRAINING = tuple(
    f"train.{field}"
    for field in ("model", "optim", "total_batch_size", "max_steps", "shuffle", "align_documents", "init_from")
)
"""what decides how good the model gets"""
VAL_LOSS = "val_loss"
_OPENAI = {"openaigpt2": "124m", "openaigpt2medium": "350m", "openaigpt2large": "774m", "openaigpt2xl": "1558m"}
"""the recipes' names for OpenAI's models -> the size in which published figures name them"""


def asked_as_published(run: Run, name: str) -> bool:
    """Whether a benchmark is HellaSwag, put to the model the way the published figures were."""
    return run.benchmarks[name].kind == "hellaswag" and prompt(run, name) in ("", "llm.c")


def other_text(run: Run) -> list[str]:
    """The fields in which the run departs from its recipe so that it was not validated on the same tokens."""
    return [field for field in departures(run) if field.startswith(("download.", "tokenize.", "evaluate.val_tokens"))]


def value_of(run: Run, other: Published, name: str, figure: str = "") -> float | None:
    """What somebody else's model has for a benchmark's figure, or for `VAL_LOSS`; None where nothing is known."""
    if name == VAL_LOSS:
        return other.val_loss
    if isinstance(other, Measured):
        score = other.scores.get(name)
        return score.figures().get(figure) if score else None
    if figure == "acc_norm" and asked_as_published(run, name):
        return other.hellaswag_acc_norm
    if figure == "centered" and run.benchmarks[name].kind == "core":
        return other.core
    return None


def compares(run: Run, other: Published, name: str) -> bool:
    """Whether somebody else's figure is over the same text or questions as ours; what was measured here always is."""
    if isinstance(other, Measured):
        return True
    if other.note is not None:
        return False
    return not other_text(run) if name == VAL_LOSS else core_tasks(run, name) is None


def reference(run: Run, name: str, figure: str = "") -> tuple[Published, float] | None:
    """The figure to name first beside ours: a measured one, else OpenAI's published one, else the first published;
    None where none compares."""
    having = [
        (each, value)
        for each in run.published
        if (value := value_of(run, each, name, figure)) is not None and compares(run, each, name)
    ]
    having.sort(key=lambda pair: (not isinstance(pair[0], Measured), "GPT-2" not in pair[0].name))
    return having[0] if having else None


def lines(run: Run, name: str, figure: str = "") -> list[tuple[int, Published, float]]:
    """(place among all others, who, value) of what a plot is to draw: one line a model, the measured one where the
    same model is also quoted."""
    found = [
        (index, each, value)
        for index, each in enumerate(run.published)
        if (value := value_of(run, each, name, figure)) is not None and each.note is None
    ]
    here = [each for _, each, _ in found if isinstance(each, Measured)]
    return [
        line for line in found if isinstance(line[1], Measured) or not any(_same_model(each, line[1]) for each in here)
    ]


def _same_model(measured: Measured, quoted: Published) -> bool:
    ours, theirs = _plain(measured.name.removesuffix(" (measured)")), _plain(quoted.name)
    return theirs in (ours, f"openaigpt2{_OPENAI.get(ours, ' ')}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def notes(run: Run) -> list[Text]:
    """Where the others' figures stand, and what keeps them from being compared."""
    quoted = run.report.published
    found: list[Text] = [
        f"{each.name}: {each.source}." + (f" Not comparable: {each.note}." if each.note else "")
        for each in run.published
    ]
    if run.evaluate_facts.scores:
        found.append("± is one standard error of a share p of n examples, sqrt(p (1 - p) / n).")
    if not quoted:
        return found
    elsewhere, losses = other_text(run), [each.name for each in quoted if each.val_loss is not None]
    if elsewhere and losses:
        why = f"Not comparable: the validation losses of {', '.join(losses)}, which are quoted. This run's validation "
        found.append((why, "tokens are not the recipe's: it departs in ", *_fields(elsewhere), "."))
    trained = [field for field in departures(run) if field.startswith(TRAINING)]
    if trained:
        why = "The published figures are for the recipe as it stands; this run was trained with another "
        found.append((why, *_fields(trained), "."))
    for name, score in run.evaluate_facts.scores.items():
        found += _benchmark_notes(run, name, score)
    if any(each.dollars is not None for each in quoted):
        found.append("Dollars depend on the price an hour as much as on the run; the published ones are of their time.")
    return found


def _benchmark_notes(run: Run, name: str, score: Score) -> list[Text]:
    """What sets a benchmark apart from that of the published figures."""
    kind, quoted = run.benchmarks[name].kind, run.report.published
    if kind == "core" and any(each.core is not None for each in quoted) and (tasks := core_tasks(run, name)):
        return [f"Not comparable: the published CORE, which is over all {tasks[1]} tasks; {tasks[0]} were scored here."]
    if kind != "hellaswag" or all(each.hellaswag_acc_norm is None for each in quoted):
        return []
    if not asked_as_published(run, name):
        how = f"it was put to the model in another way ({prompt(run, name)}) than for them"
        return [f"Not comparable with published figures: {title(run, name)}; {how}."]
    if score.examples != HELLASWAG_EXAMPLES:
        return [f"HellaSwag: {score.examples:,} examples here, {HELLASWAG_EXAMPLES:,} for the published figures."]
    return []


def _fields(names: Sequence[str]) -> list[str]:
    listed: list[str] = []
    for name in names:
        listed += [", ", Code(name)]
    return listed[1:]
