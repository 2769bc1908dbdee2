"""Which tokens go through the model together: sequences cut to the context length, those that begin alike in one row,
rows in batches of about one width."""

from __future__ import annotations

from itertools import pairwise
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


class Rows(NamedTuple):
    """U rows for the model: each one segment, or several whose common beginning stands there once."""

    first: NDArray[np.int64]  # (U,) the row's first segment
    alternatives: NDArray[np.int64]  # (U,) how many segments, which follow one another
    shared: NDArray[np.int64]  # (U,) input tokens with which all of them begin, 0 for a single one
    width: NDArray[np.int64]  # (U,) input tokens of the row


def join(tokens: NDArray[np.uint16], segments: Segments, groups: NDArray[np.int64], context: int) -> Rows:
    """Put the alternatives of an example into one row where that spares work.

    Attention grows with the square of a row's width. So they are joined if their row is no longer than the context, or
    if its square is at most twice the sum of theirs.

    Args:
        tokens: (N,) that the segments lie in.
        groups: (S,) segments that follow one another and have the same number are alternatives.
    """
    inputs = segments.inputs()
    bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    rows: list[tuple[int, int, int, int]] = []
    for first, last in pairwise(bounds):
        lengths = inputs[first:last]
        pieces = [tokens[segments.begin[i] : segments.end[i] - 1] for i in range(first, last)]
        shared = min((_common(pieces[0], piece) for piece in pieces[1:]), default=0)
        width = shared + int((lengths - shared).sum())
        if shared and (width <= context or width**2 <= 2 * int((lengths**2).sum())):
            rows.append((first, last - first, shared, width))
        else:
            rows += [(i, 1, 0, int(inputs[i])) for i in range(first, last)]
    return Rows(*np.array(rows, np.int64).reshape(-1, 4).T)


def _common(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def batches(width: NDArray[np.int64], tokens: int, context: int) -> list[NDArray[np.int64]]:
    """Indices of rows that go through the model together, widest first, so that too large a batch fails at once.

    A batch has at most `tokens` input tokens, padding included, and at least one row. The division depends on nothing
    else, so it is the same on any number of processes.
    """
    order = np.lexsort((np.arange(len(width)), -width))
    found, first = [], 0
    while first < len(order):
        rows = max(1, tokens // padded(int(width[order[first]]), context))
        found.append(order[first : first + rows])
        first += rows
    return found


def padded(length: int, context: int) -> int:
    """Width of a batch whose widest row has `length` inputs."""
    rounded = -(-length // ROUND_TO) * ROUND_TO
    return rounded if length > context else min(context, rounded)
