"""A run's benchmarks in words: what each is called, what it asks, and which of its figures stands for it."""

from __future__ import annotations

import math

from gpt2.report.run import Run
from gpt2.stage.facts import Score

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
_KNOWN_AS = {"arc-easy": "ARC Easy", "arc-challenge": "ARC Challenge"}
"""benchmarks of one kind that have names of their own"""
_TASK = {
    "hellaswag": "the right one of four endings",
    "continuation": "the true continuation of a held-out passage among four",
    "lambada": "the last word of a passage",
    "piqa": "the better of two ways to a goal",
    "winogrande": "whom a sentence is about, of two",
}
_BY_CHARACTERS = ("hellaswag", "arc", "piqa")
"""of which lm-evaluation-harness's users quote acc_norm; of its other tasks acc"""
_AS_HARNESS = ("arc", "piqa", "winogrande", "lambada")
"""put to the model as lm-evaluation-harness does, without a choice"""


def task(run: Run, name: str) -> str:
    """What is asked, as a parenthesis for people who do not know the benchmark; empty for those without one."""
    asked = _TASK.get(run.benchmarks[name].kind)
    return f" ({asked})" if asked else ""


def prompt(run: Run, name: str) -> str:
    """How a benchmark is put to the model: "llm.c", "harness", ..."""
    score = run.evaluate_facts.scores.get(name)
    if score is not None and score.prompt:
        return score.prompt
    default = "harness" if run.benchmarks[name].kind in _AS_HARNESS else ""
    return str(run.stage(f"benchmark-{name}").request.config.get("prompt", default))


def title(run: Run, name: str) -> str:
    """What a benchmark is called in headings: "HellaSwag"; with our own name for it where that says more, and with what
    sets it apart from what others mean by the name."""
    kind = run.benchmarks[name].kind
    proper = _KNOWN_AS.get(name) or _PROPER.get(kind)
    if proper is None:
        return name
    usual = {kind, *_KNOWN_AS}
    if kind == "hellaswag" and prompt(run, name) == "harness":
        proper, usual = f"{proper}, harness prompt", {*usual, f"{kind}-harness"}
    if kind == "core" and (tasks := core_tasks(run, name)) is not None:
        proper = f"{proper}, {tasks[0]} of {tasks[1]} tasks"
    return proper if name in usual else f"{proper} ({name})"


def core_tasks(run: Run, name: str) -> tuple[int, int] | None:
    """(tasks scored, tasks there are) of a CORE that is not whole; None for a whole one and for other benchmarks."""
    score, left_out = run.evaluate_facts.scores.get(name), run.benchmarks[name].left_out
    if run.benchmarks[name].kind != "core" or score is None or not left_out:
        return None
    return len(score.parts), len(score.parts) + len(left_out)


def standing_for(run: Run, name: str) -> tuple[str, ...]:
    """The figures that may stand for a benchmark, the one that the field quotes first."""
    if prompt(run, name) == "harness":
        return ("acc_norm_chars", "acc") if run.benchmarks[name].kind in _BY_CHARACTERS else ("acc", "perplexity")
    return "acc_norm", "acc", "centered", "perplexity"


def main_figure(run: Run, name: str, score: Score) -> str | None:
    """The figure that stands for a benchmark; None where it has none."""
    figures = score.figures()
    return next((figure for figure in (*standing_for(run, name), *figures) if figure in figures), None)


def is_share(figure: str | None) -> bool:
    """Whether a figure is a share of right answers, which has a standard error."""
    return figure is not None and figure.startswith("acc")


def standard_error(share: float, examples: int) -> float:
    """Of a share of so many examples: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / examples)


def like_guessing(share: float, score: Score) -> bool:
    """Whether a share of right answers lies so near to what guessing gives that it says nothing: within two of the
    standard errors that guessing itself has."""
    return score.chance is not None and abs(share - score.chance) < 2 * standard_error(score.chance, score.examples)
