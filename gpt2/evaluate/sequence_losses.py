"""The forward passes of a benchmark: the summed loss of each sequence's scored tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2.benchmark.examples import Examples
from gpt2.distributed import World
from gpt2.evaluate.packing import Rows, Segments, batches, merge_alternatives, sliding_windows, truncate
from gpt2.evaluate.shared_prefix import hidden_states, pack_batch
from gpt2.evaluate.token_losses import OnTokens, autocast, losses_at
from gpt2.model.gpt import GPT


@dataclass(frozen=True)
class SequenceLosses:
    """Losses of the R sequences of a benchmark."""

    losses: NDArray[np.float64]  # (R,) nats, summed over the scored tokens
    counts: NDArray[np.int64]  # (R,) scored tokens
    greedy: NDArray[np.bool_]  # (R,) whether greedy decoding gives the scored tokens; False except for last words
    truncated: NDArray[np.bool_]  # (R,) whether the sequence exceeded the context and lost its left end


def sequence_losses(
    model: GPT,
    examples: Examples,
    world: World,
    batch_tokens: int = 16_384,
    precision: str = "fp32",
    on_tokens: OnTokens | None = None,
) -> SequenceLosses:
    """Compute the losses of all sequences; a collective call with the same result on every process.

    The batches do not depend on the number of processes, and each sum comes from one process, so the result is the
    same for any number of processes.

    Args:
        batch_tokens: input tokens per batch, padding included.
        precision: "fp32", or "bf16" for matrix products in bfloat16.
    """
    context = model.config.block_size
    segments, groups, truncated, needs_greedy = _segments(examples, context)
    rows, inputs = merge_alternatives(examples.tokens, segments, groups, context), segments.inputs()
    losses = torch.zeros(len(segments.end), dtype=torch.float64)
    greedy = torch.zeros(len(segments.end), dtype=torch.float64)
    was_training = model.training
    model.eval()
    for indices in batches(rows.width, batch_tokens, context)[world.rank :: world.size]:
        batch = pack_batch(examples.tokens, segments, Rows(*(column[indices] for column in rows)), context)
        segment = torch.from_numpy(batch.segment)
        inputs_on_device = batch.to(world.device)
        with autocast(world.device, precision):
            loss, is_greedy = losses_at(
                model,
                hidden_states(model, inputs_on_device),
                inputs_on_device.scored,
                inputs_on_device.targets,
                greedy=bool(needs_greedy[batch.segment].any()),
            )
        losses.index_add_(0, segment, loss.double().cpu())
        if is_greedy is not None:
            greedy.index_add_(0, segment, is_greedy.double().cpu())
        if on_tokens is not None:
            on_tokens(int(inputs[np.unique(batch.segment)].sum()))
    model.train(was_training)
    sums = world.all_reduce(torch.stack([losses, greedy]).to(world.device)).cpu().numpy()
    n_sequences = len(examples.scored)
    counts = np.bincount(segments.sequence, segments.scored, n_sequences).astype(np.int64)
    return SequenceLosses(
        losses=np.bincount(segments.sequence, sums[0], n_sequences).astype(np.float64),
        counts=counts,
        greedy=np.bincount(segments.sequence, sums[1], n_sequences) == counts,
        truncated=truncated,
    )


def _segments(
    examples: Examples, context: int
) -> tuple[Segments, NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """The S segments; (S,) a number that the alternatives of an example share; (R,) truncated sequences; (S,) segments
    for which greedy tokens are needed."""
    pieces, truncated, needs_greedy = [], np.zeros(len(examples.scored), bool), []
    groups: list[NDArray[np.int64]] = []
    for part, of_part in examples.parts():
        first, last = examples.groups[of_part.start], examples.groups[of_part.stop]
        starts, scored = examples.starts[first : last + 1], examples.scored[first:last]
        if part.form == "perplexity":
            piece = sliding_windows(starts, scored, context, min(part.stride or context, context))
        else:
            # nanochat truncates CORE's prompts to block_size including the last token, which is only predicted
            length = context - 1 if examples.description.kind == "core" else context
            piece, truncated[first:last] = truncate(starts, scored, length)
        pieces.append(piece._replace(sequence=piece.sequence + first))
        if part.form == "choice":
            groups.append(np.searchsorted(examples.groups, pieces[-1].sequence, side="right") - 1)
        else:  # no alternatives
            groups.append(-1 - sum(map(len, groups)) - np.arange(len(piece.end)))
        needs_greedy.append(np.full(len(piece.end), part.form == "last_word"))
    return (
        Segments(*(np.concatenate(columns) for columns in zip(*pieces, strict=True))),
        np.concatenate(groups),
        truncated,
        np.concatenate(needs_greedy),
    )
