"""Which tokens go through the model together: sequences cut to the context length, in batches of about one length."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUND_TO = 8  # lengths are rounded up to this, so that few shapes occur and the matrix units like them


class Segments(NamedTuple):
    """S pieces of sequences, each at most context + 1 tokens, of which the end is scored."""

    sequence: NDArray[np.int64]  # (S,) which sequence it is a piece of
    begin: NDArray[np.int64]  # (S,) in the flat tokens
    end: NDArray[np.int64]  # (S,)
    scored: NDArray[np.int64]  # (S,)

    def inputs(self) -> NDArray[np.int64]:
        """(S,) tokens that go into the model: the last one is only predicted."""
        return self.end - self.begin - 1


def cut(starts: NDArray[np.int64], scored: NDArray[np.integer], context: int) -> tuple[Segments, NDArray[np.bool_]]:
    """One segment a sequence: whole, or where it is longer than the context + 1, its last context + 1 tokens.

    Args:
        starts: (R + 1,) where each sequence begins.
        scored: (R,) how many tokens at its end are scored.
        context: the model's block_size.

    Returns:
        the segments, and which sequences were cut (R,).
    """
    end = starts[1:]
    begin = np.maximum(starts[:-1], end - context - 1)
    count = np.minimum(scored.astype(np.int64), end - begin - 1)
    return Segments(np.arange(len(end)), begin, end, count), begin > starts[:-1]


def windows(starts: NDArray[np.int64], scored: NDArray[np.integer], context: int, stride: int) -> Segments:
    """Windows over long sequences: every scored token once, each with as much before it as the stride leaves.

    The first window scores all of its predictions, every later one only the last `stride` or what is left, with
    context - stride or more tokens before them. stride = context: no overlap.
    """
    if not 0 < stride <= context:
        raise ValueError(f"a stride of {stride} does not lie between 1 and the context length {context}")
    pieces = []
    for row, (begin, end, count) in enumerate(zip(starts[:-1], starts[1:], scored, strict=True)):
        done = end - count  # first token that is not scored yet
        reach = min(end, max(begin + context + 1, done + 1))
        while done < end:
            pieces.append((row, max(begin, reach - context - 1), reach, reach - done))
            done, reach = reach, min(end, reach + stride)
    columns = np.array(pieces, np.int64).reshape(-1, 4).T
    return Segments(*columns)


def batches(segments: Segments, tokens: int, context: int) -> list[NDArray[np.int64]]:
    """Indices of segments that go through the model together, longest first, so that too large a batch fails at once.

    A batch has at most `tokens` input tokens, padding included, and at least one segment. The division depends on
    nothing else, so it is the same on any number of processes.
    """
    inputs = segments.inputs()
    order = np.lexsort((np.arange(len(inputs)), -inputs))
    found, first = [], 0
    while first < len(order):
        width = padded(int(inputs[order[first]]), context)
        rows = max(1, tokens // width)
        found.append(order[first : first + rows])
        first += rows
    return found


def padded(length: int, context: int) -> int:
    """Width of a batch whose longest segment has `length` inputs."""
    return min(context, -(-length // ROUND_TO) * ROUND_TO)


def padding_fraction(segments: Segments, tokens: int, context: int) -> float:
    """Share of the input positions that hold no token."""
    inputs = segments.inputs()
    places = sum(len(rows) * padded(int(inputs[rows].max()), context) for rows in batches(segments, tokens, context))
    return 1 - int(inputs.sum()) / places
