"""Our figures beside somebody else's: which published one belongs to which of ours, and what is not to be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gpt2.config import Published
from gpt2.manifest import Score
from gpt2.report.again import departures
from gpt2.report.document import Code, Text
from gpt2.report.run import Run

HELLASWAG_EXAMPLES = 10_042  # of the validation set, which published figures are over
TRAINING = tuple(
    f"train.{field}"
    for field in ("model", "optim", "total_batch_size", "max_steps", "shuffle", "align_documents", "init_from")
)
"""what decides how good the model gets"""
_PROPER = {
    "hellaswag": "HellaSwag",
    "continuation": "Continuation",
    "lambada": "LAMBADA",
    "arc": "ARC",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "wikitext103": "WikiText-103",
    "core": "CORE",
}


_TASK = {
    "hellaswag": "the right one of four endings",
    "continuation": "the true continuation of a held-out passage among four",
    "lambada": "the last word of a passage",
    "piqa": "the better of two ways to a goal",
    "winogrande": "whom a sentence is about, of two",
}


def benchmark_task(run: Run, name: str) -> str:
    """What is asked, as a parenthesis for people who do not know the benchmark; empty for those without one."""
    task = _TASK.get(run.benchmarks[name].kind)
    return f" ({task})" if task else ""


def benchmark_title(run: Run, name: str) -> str:
    """What a benchmark is called in headings: "HellaSwag"; with our own name for it where that says more."""
    kind = run.benchmarks[name].kind
    proper = _PROPER.get(kind)
    if proper is None:
        return name
    return proper if name == kind else f"{proper} ({name})"


def main_figure(figures: Mapping[str, float]) -> str | None:
    """The figure that stands for a benchmark: the first that it has of acc_norm, acc, centered, perplexity."""
    return next((name for name in ("acc_norm", "acc", "centered", "perplexity") if name in figures), None)


def standard_error(share: float, examples: int) -> float:
    """Of a share of so many examples: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / examples)


def asked_as_published(run: Run, name: str) -> bool:
    """Whether a benchmark is HellaSwag, put to the model the way the published figures were."""
    score = run.evaluate_facts.scores.get(name)
    return run.benchmarks[name].kind == "hellaswag" and (score is None or score.prompt in ("", "llm.c"))


def other_text(run: Run) -> list[str]:
    """The fields in which the run departs from its recipe so that it was not validated on the same tokens."""
    return [field for field in departures(run) if field.startswith(("download.", "tokenize.", "evaluate.val_tokens"))]


def val_loss_reference(run: Run) -> tuple[Published, float] | None:
    """The validation loss to name first beside ours, measured before published; None where none compares."""
    return _reference(run.measured, "val_loss") or (
        None if other_text(run) else _reference(run.report.published, "val_loss")
    )


def hellaswag_reference(run: Run, name: str) -> tuple[Published, float] | None:
    """The same for acc_norm of HellaSwag."""
    return _reference(run.published, "hellaswag_acc_norm") if asked_as_published(run, name) else None


def _reference(published: Sequence[Published], field: str) -> tuple[Published, float] | None:
    """OpenAI's GPT-2 where it has a figure that compares, else the first that has one."""
    having = [(each, value) for each in published if (value := getattr(each, field)) is not None and each.note is None]
    return next((pair for pair in having if "GPT-2" in pair[0].name), having[0] if having else None)


def notes(run: Run) -> list[Text]:
    """Where the published figures stand, and what keeps them from being compared."""
    published = run.published
    found: list[Text] = [
        f"{each.name}: {each.source}." + (f" Not comparable: {each.note}." if each.note else "") for each in published
    ]
    if run.evaluate_facts.scores:
        found.append("± is one standard error of a share p of n examples, sqrt(p (1 - p) / n).")
    if not published:
        return found
    elsewhere = other_text(run)
    if elsewhere and any(each.val_loss is not None for each in published):
        why = "Not comparable: the validation losses. This run's validation tokens are not the recipe's: it departs in "
        found.append((why, *_fields(elsewhere), "."))
    trained = [field for field in departures(run) if field.startswith(TRAINING)]
    if trained:
        why = "The published figures are for the recipe as it stands; this run was trained with another "
        found.append((why, *_fields(trained), "."))
    for name, score in run.evaluate_facts.scores.items():
        found += _hellaswag_notes(run, name, score)
    if any(each.dollars is not None for each in published):
        found.append("Dollars depend on the price an hour as much as on the run; the published ones are of their time.")
    return found


def _hellaswag_notes(run: Run, name: str, score: Score) -> list[Text]:
    if run.benchmarks[name].kind != "hellaswag":
        return []
    if not asked_as_published(run, name):
        how = f"it was put to the model in another way ({score.prompt}) than for the published figures"
        return [f"Not comparable: {name}; {how}."]
    if score.examples != HELLASWAG_EXAMPLES:
        return [f"HellaSwag: {score.examples:,} examples here, {HELLASWAG_EXAMPLES:,} for the published figures."]
    return []


def _fields(names: Sequence[str]) -> list[str]:
    listed: list[str] = []
    for name in names:
        listed += [", ", Code(name)]
    return listed[1:]
