"""HellaSwag scoring, and that of all other benchmarks: acc, acc_norm, perplexity and CORE from sequence losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2.benchmark.examples import Examples, Part, load
from gpt2.distributed import World
from gpt2.evaluate.sequence_losses import SequenceLosses, sequence_losses
from gpt2.model.gpt import GPT
from gpt2.stage.facts import Score


@dataclass(frozen=True)
class Predictions:
    """Index of the predicted answer of each of E examples, by four criteria; each minimizes a loss."""

    by_sum: NDArray[np.int16]  # (E,) loss: acc
    by_mean: NDArray[np.int16]  # (E,) loss per token: acc_norm
    by_chars: NDArray[np.int16] | None  # (E,) loss per character: acc_norm_chars
    by_bytes: NDArray[np.int16] | None  # (E,) loss per byte: acc_norm_bytes


def score_benchmark(
    model: GPT,
    directory: Path,
    world: World,
    batch_tokens: int = 16_384,
    precision: str = "fp32",
) -> Score:
    """Score the benchmark prepared in `directory`; arguments as of `sequence_losses`.

    Raises:
        UserError: nothing is prepared there, or it is damaged.
    """
    examples = load(directory)
    return score(examples, sequence_losses(model, examples, world, batch_tokens, precision))


def score(examples: Examples, losses: SequenceLosses) -> Score:
    """The figures of a benchmark. CORE: the mean of its tasks' centered accuracies, and the figures of each task."""
    parts = {part.name: _score_part(examples, losses, part, of_part) for part, of_part in examples.parts()}
    prompt = examples.description.prompt
    if examples.description.kind != "core":
        (single,) = parts.values()
        return single.model_copy(update={"prompt": prompt})
    parts = {
        part.name: parts[part.name].model_copy(update={"centered": _centered(parts[part.name], part)})
        for part in examples.description.parts
    }
    return Score(
        centered=math.fsum(part.centered or 0.0 for part in parts.values()) / len(parts),
        examples=sum(part.examples for part in parts.values()),
        truncated=sum(part.truncated for part in parts.values()),
        parts=parts,
        prompt=prompt,
    )


def predict(examples: Examples, losses: SequenceLosses, of_part: slice) -> Predictions:
    """Predictions for the examples of a multiple-choice part. The first of equal answers wins, as with numpy's argmin
    in lm-evaluation-harness."""
    groups = examples.groups[of_part.start : of_part.stop + 1]
    first, last = groups[0], groups[-1]

    def lowest(values: NDArray[np.float64]) -> NDArray[np.int16]:
        return np.array([int(values[a:b].argmin()) for a, b in pairwise(groups)], np.int16)

    def by(lengths: NDArray[np.int32]) -> NDArray[np.int16] | None:
        return lowest(losses.losses / np.maximum(lengths, 1)) if lengths[first:last].all() and last > first else None

    return Predictions(
        by_sum=lowest(losses.losses),
        by_mean=lowest(losses.losses / np.maximum(losses.counts, 1)),
        by_chars=by(examples.chars),
        by_bytes=by(examples.bytes),
    )


def _score_part(examples: Examples, losses: SequenceLosses, part: Part, of_part: slice) -> Score:
    rows = slice(int(examples.groups[of_part.start]), int(examples.groups[of_part.stop]))
    nats = math.fsum(losses.losses[rows].tolist())
    figures: dict[str, float | None]
    if part.form == "perplexity":
        figures = {"perplexity": math.exp(nats / int(examples.units[rows].sum()))}
    elif part.form == "last_word":
        figures = {"acc": float(losses.greedy[rows].mean()), "perplexity": math.exp(nats / part.examples)}
    else:
        predictions, labels = predict(examples, losses, of_part), examples.labels[of_part]
        figures = {
            "acc": _accuracy(predictions.by_sum, labels),
            "acc_norm": _accuracy(predictions.by_mean, labels),
            "acc_norm_chars": _accuracy(predictions.by_chars, labels),
            "acc_norm_bytes": _accuracy(predictions.by_bytes, labels),
        }
    truncated = int(losses.truncated[rows].sum())
    score = Score(examples=part.examples, chance=part.chance, truncated=truncated, unit=part.unit)
    return score.model_copy(update=figures)


def _accuracy(predictions: NDArray[np.int16] | None, labels: NDArray[np.int16]) -> float | None:
    return None if predictions is None else float((predictions == labels).mean())


def _centered(score: Score, part: Part) -> float:
    """0 at chance, 1 without an error (Li et al. 2024, DataComp-LM, section 3.5)."""
    acc = (score.acc_norm if part.by == "mean" else score.acc) or 0.0
    chance = part.chance or 0.0
    return (acc - chance) / (1 - chance)
