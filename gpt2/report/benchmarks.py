"""Names, tasks and main figures of a run's benchmarks."""

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
"""benchmark -> name, where its kind covers several"""
_TASK = {
    "hellaswag": "choose one of four endings",
    "continuation": "choose one of four continuations of a held-out passage",
    "lambada": "predict the last word of a passage",
    "piqa": "choose one of two ways to a goal",
    "winogrande": "choose one of two referents",
}
_BY_CHARACTERS = ("hellaswag", "arc", "piqa")
"""kinds whose usual figure in lm-evaluation-harness is acc_norm; for the others it is acc"""
_AS_HARNESS = ("arc", "piqa", "winogrande", "lambada")
"""kinds that only have lm-evaluation-harness's prompt"""


def task(run: Run, name: str) -> str:
    """The task in parentheses; empty where none is listed."""
    description = _TASK.get(run.benchmarks[name].kind)
    return f" ({description})" if description else ""


def prompt(run: Run, name: str) -> str:
    """The prompt format: "llm.c", "harness", ..."""
    score = run.evaluate_facts.scores.get(name)
    if score is not None and score.prompt:
        return score.prompt
    default = "harness" if run.benchmarks[name].kind in _AS_HARNESS else ""
    return str(run.stage(f"benchmark-{name}").request.config.get("prompt", default))


def title(run: Run, name: str) -> str:
    """The name in headings: "HellaSwag", with the recipe's name or the prompt format where these differ from usual."""
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
    """(scored, total) tasks of an incomplete CORE; None for a complete one and for other benchmarks."""
    score, left_out = run.evaluate_facts.scores.get(name), run.benchmarks[name].left_out
    if run.benchmarks[name].kind != "core" or score is None or not left_out:
        return None
    return len(score.parts), len(score.parts) + len(left_out)


def figure_candidates(run: Run, name: str) -> tuple[str, ...]:
    """Candidates for the main figure of a benchmark, the most quoted first."""
    if prompt(run, name) == "harness":
        return ("acc_norm_chars", "acc") if run.benchmarks[name].kind in _BY_CHARACTERS else ("acc", "perplexity")
    return "acc_norm", "acc", "centered", "perplexity"


def main_figure(run: Run, name: str, score: Score) -> str | None:
    """The most quoted figure that the score has; None where it has no figure."""
    figures = score.figures()
    return next((figure for figure in (*figure_candidates(run, name), *figures) if figure in figures), None)


def is_share(figure: str | None) -> bool:
    """Whether a figure is an accuracy, which has a standard error."""
    return figure is not None and figure.startswith("acc")


def standard_error(share: float, examples: int) -> float:
    """sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / examples)


def at_chance(share: float, score: Score) -> bool:
    """Whether an accuracy lies within two standard errors of chance."""
    return score.chance is not None and abs(share - score.chance) < 2 * standard_error(score.chance, score.examples)
