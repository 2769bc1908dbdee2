"""Scoring a prepared benchmark: how likely is each scored end, and what does the model pick?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2.benchmark.prepared import Examples, Part, load
from gpt2.distributed import World
from gpt2.evaluate.packing import Rows, Segments, batches, cut, join, windows
from gpt2.evaluate.scoring import OnTokens, autocast, chosen_losses
from gpt2.evaluate.shared_prefix import hidden, lay_out
from gpt2.model.gpt import GPT
from gpt2.stage.facts import Score


@dataclass(frozen=True)
class Sums:
    """What the model says of each of R sequences."""

    losses: NDArray[np.float64]  # (R,) nats, summed over the scored tokens
    counts: NDArray[np.int64]  # (R,) scored tokens
    greedy: NDArray[np.bool_]  # (R,) whether each scored token is the likeliest; all False where nobody asked
    cut: NDArray[np.bool_]  # (R,) whether the sequence was longer than the context and lost its left end


@dataclass(frozen=True)
class Picks:
    """Which sequence each of E examples chose, by each way of choosing; what is kept for comparing models."""

    by_sum: NDArray[np.int16]  # (E,)
    by_mean: NDArray[np.int16]
    by_chars: NDArray[np.int16] | None
    by_bytes: NDArray[np.int16] | None


def score_benchmark(
    model: GPT,
    directory: Path,
    world: World,
    batch_tokens: int = 16_384,
    precision: str = "fp32",
) -> Score:
    """Score the benchmark prepared in `directory`. Every process must call it, and each gets the same result.

    Args:
        batch_tokens: input tokens that go through the model at a time, padding included.
        precision: "fp32", or "bf16" for matrix products in bfloat16.

    Raises:
        UserError: nothing is prepared there, or it is damaged.
    """
    examples = load(directory)
    return score(examples, sequence_sums(model, examples, world, batch_tokens, precision))


def sequence_sums(
    model: GPT,
    examples: Examples,
    world: World,
    batch_tokens: int = 16_384,
    precision: str = "fp32",
    on_tokens: OnTokens | None = None,
) -> Sums:
    """Sum of the losses of each sequence's scored end; arguments as of `score_benchmark`.

    Batches are divided without regard to the number of processes and dealt out whole, and every sum comes from one
    process alone, so the result does not depend on that number.
    """
    context = model.config.block_size
    segments, groups, was_cut, need_greedy = _segments(examples, context)
    rows, inputs = join(examples.tokens, segments, groups, context), segments.inputs()
    losses = torch.zeros(len(segments.end), dtype=torch.float64)
    greedy = torch.zeros(len(segments.end), dtype=torch.float64)
    was_training = model.training
    model.eval()
    for some in batches(rows.width, batch_tokens, context)[world.rank :: world.size]:
        batch = lay_out(examples.tokens, segments, Rows(*(column[some] for column in rows)), context)
        owner = torch.from_numpy(batch.segment)
        there = batch.to(world.device)
        with autocast(world.device, precision):
            loss, likeliest = chosen_losses(
                model, hidden(model, there), there.chosen, there.targets, greedy=bool(need_greedy[batch.segment].any())
            )
        losses.index_add_(0, owner, loss.double().cpu())
        if likeliest is not None:
            greedy.index_add_(0, owner, likeliest.double().cpu())
        if on_tokens is not None:
            on_tokens(int(inputs[np.unique(batch.segment)].sum()))
    model.train(was_training)
    sums = world.all_reduce(torch.stack([losses, greedy]).to(world.device)).cpu().numpy()
    rows_in_all = len(examples.scored)
    counts = np.bincount(segments.sequence, segments.scored, rows_in_all).astype(np.int64)
    return Sums(
        losses=np.bincount(segments.sequence, sums[0], rows_in_all).astype(np.float64),
        counts=counts,
        greedy=np.bincount(segments.sequence, sums[1], rows_in_all) == counts,
        cut=was_cut,
    )


def _segments(
    examples: Examples, context: int
) -> tuple[Segments, NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """What goes through the model; a number (S,) that alternatives have in common; which sequences (R,) were cut; for
    which segments (S,) greedy tokens matter."""
    pieces, was_cut, need_greedy = [], np.zeros(len(examples.scored), bool), []
    groups: list[NDArray[np.int64]] = []
    for part, among in examples.parts():
        first, last = examples.groups[among.start], examples.groups[among.stop]
        starts, scored = examples.starts[first : last + 1], examples.scored[first:last]
        if part.form == "perplexity":
            piece = windows(starts, scored, context, min(part.stride or context, context))
        else:
            # nanochat cuts CORE's prompts so that the last token, which only is predicted, fits in too
            length = context - 1 if examples.description.kind == "core" else context
            piece, was_cut[first:last] = cut(starts, scored, length)
        pieces.append(piece._replace(sequence=piece.sequence + first))
        if part.form == "choice":
            groups.append(np.searchsorted(examples.groups, pieces[-1].sequence, side="right") - 1)
        else:  # each alone
            groups.append(-1 - sum(map(len, groups)) - np.arange(len(piece.end)))
        need_greedy.append(np.full(len(piece.end), part.form == "last_word"))
    return (
        Segments(*(np.concatenate(columns) for columns in zip(*pieces, strict=True))),
        np.concatenate(groups),
        was_cut,
        np.concatenate(need_greedy),
    )


# ----------------------------------------------------------------------------------------------- from sums to figures


def score(examples: Examples, sums: Sums) -> Score:
    """The figures of a benchmark; of one made of several tasks the mean of their centered accuracies, and each."""
    parts = {part.name: _score(examples, sums, part, among) for part, among in examples.parts()}
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


def picks(examples: Examples, sums: Sums, among: slice) -> Picks:
    """What the examples of a multiple-choice part chose. Of two equal ends the first is taken, as numpy's argmin and
    so lm-evaluation-harness does."""
    groups = examples.groups[among.start : among.stop + 1]
    first, last = groups[0], groups[-1]

    def lowest(values: NDArray[np.float64]) -> NDArray[np.int16]:
        return np.array([int(values[a:b].argmin()) for a, b in pairwise(groups)], np.int16)

    def by(lengths: NDArray[np.int32]) -> NDArray[np.int16] | None:
        return lowest(sums.losses / np.maximum(lengths, 1)) if lengths[first:last].all() and last > first else None

    return Picks(
        lowest(sums.losses), lowest(sums.losses / np.maximum(sums.counts, 1)), by(examples.chars), by(examples.bytes)
    )


def _score(examples: Examples, sums: Sums, part: Part, among: slice) -> Score:
    rows = slice(int(examples.groups[among.start]), int(examples.groups[among.stop]))
    score = Score(examples=part.examples, chance=part.chance, truncated=int(sums.cut[rows].sum()), unit=part.unit)
    nats = math.fsum(sums.losses[rows].tolist())
    figures: dict[str, float | None]
    if part.form == "perplexity":
        figures = {"perplexity": math.exp(nats / int(examples.units[rows].sum()))}
    elif part.form == "last_word":
        figures = {"acc": float(sums.greedy[rows].mean()), "perplexity": math.exp(nats / part.examples)}
    else:
        chosen, labels = picks(examples, sums, among), examples.labels[among]
        figures = {
            "acc": _right(chosen.by_sum, labels),
            "acc_norm": _right(chosen.by_mean, labels),
            "acc_norm_chars": _right(chosen.by_chars, labels),
            "acc_norm_bytes": _right(chosen.by_bytes, labels),
        }
    return score.model_copy(update=figures)


def _right(chosen: NDArray[np.int16] | None, labels: NDArray[np.int16]) -> float | None:
    return None if chosen is None else float((chosen == labels).mean())


def _centered(score: Score, part: Part) -> float:
    """0 for guessing, 1 for no mistake (Li et al. 2024, DataComp-LM, section 3.5)."""
    acc = (score.acc_norm if part.by == "mean" else score.acc) or 0.0
    chance = part.chance or 0.0
    return (acc - chance) / (1 - chance)
