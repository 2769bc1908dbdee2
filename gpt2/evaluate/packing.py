"""Batching of sequences: truncation to the context, one row for sequences with a common prefix, batches by width."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUND_TO = 8  # widths are multiples of this: few shapes, and aligned ones for tensor cores


class Segments(NamedTuple):
    """S pieces of sequences, each of at most context + 1 tokens; the last tokens of each are scored."""

    sequence: NDArray[np.int64]  # (S,) index of the sequence
    begin: NDArray[np.int64]  # (S,) offset in the flat tokens
    end: NDArray[np.int64]  # (S,)
    scored: NDArray[np.int64]  # (S,) number of scored tokens at the end

    def inputs(self) -> NDArray[np.int64]:
        """(S,) input tokens of the model; the last token is only predicted."""
        return self.end - self.begin - 1


def truncate(
    starts: NDArray[np.int64], scored: NDArray[np.integer], context: int
) -> tuple[Segments, NDArray[np.bool_]]:
    """One segment per sequence: its last context + 1 tokens, or all of a shorter one.

    Args:
        starts: (R + 1,) offset of each sequence.
        scored: (R,) number of scored tokens at the end.
        context: the model's block_size.

    Returns:
        the segments, and whether each sequence was truncated (R,).
    """
    end = starts[1:]
    begin = np.maximum(starts[:-1], end - context - 1)
    count = np.minimum(scored.astype(np.int64), end - begin - 1)
    return Segments(np.arange(len(end)), begin, end, count), begin > starts[:-1]


def sliding_windows(starts: NDArray[np.int64], scored: NDArray[np.integer], context: int, stride: int) -> Segments:
    """Windows over long sequences that score every token once.

    The first window scores all of its predictions, a later one only the last `stride` (or the rest), each with at least
    context - stride tokens of context. stride = context: no overlap.
    """
    if not 0 < stride <= context:
        raise ValueError(f"stride is {stride}: it must be between 1 and the context length {context}")
    pieces = []
    for row, (begin, end, count) in enumerate(zip(starts[:-1], starts[1:], scored, strict=True)):
        done = end - count  # the first token that is not scored yet
        reach = min(end, max(begin + context + 1, done + 1))
        while done < end:
            pieces.append((row, max(begin, reach - context - 1), reach, reach - done))
            done, reach = reach, min(end, reach + stride)
    columns = np.array(pieces, np.int64).reshape(-1, 4).T
    return Segments(*columns)


class Rows(NamedTuple):
    """U rows of a batch: each is one segment, or several segments after their common prefix."""

    first: NDArray[np.int64]  # (U,) index of the first segment
    alternatives: NDArray[np.int64]  # (U,) number of consecutive segments
    shared: NDArray[np.int64]  # (U,) input tokens of the common prefix, 0 for a single segment
    width: NDArray[np.int64]  # (U,) input tokens


def merge_alternatives(tokens: NDArray[np.uint16], segments: Segments, groups: NDArray[np.int64], context: int) -> Rows:
    """Put the alternatives of an example into one row if this reduces the work.

    Attention grows with the square of the width, so alternatives are merged if their row is not wider than the context
    or if its squared width is at most twice the sum of their squared widths.

    Args:
        tokens: (N,) flat tokens.
        groups: (S,) consecutive segments with the same number are alternatives.
    """
    inputs = segments.inputs()
    bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    rows: list[tuple[int, int, int, int]] = []
    for first, last in pairwise(bounds):
        lengths = inputs[first:last]
        pieces = [tokens[segments.begin[i] : segments.end[i] - 1] for i in range(first, last)]
        shared = min((_prefix_length(pieces[0], piece) for piece in pieces[1:]), default=0)
        width = shared + int((lengths - shared).sum())
        if shared and (width <= context or width**2 <= 2 * int((lengths**2).sum())):
            rows.append((first, last - first, shared, width))
        else:
            rows += [(i, 1, 0, int(inputs[i])) for i in range(first, last)]
    return Rows(*np.array(rows, np.int64).reshape(-1, 4).T)


def _prefix_length(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> int:
    """Number of tokens in the common prefix."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def batches(width: NDArray[np.int64], tokens: int, context: int) -> list[NDArray[np.int64]]:
    """Row indices of each batch, widest first, so that an OOM shows at once.

    A batch has at most `tokens` input tokens, padding included, and at least one row. The number of processes has no
    influence.
    """
    order = np.lexsort((np.arange(len(width)), -width))
    result, first = [], 0
    while first < len(order):
        rows = max(1, tokens // padded_width(int(width[order[first]]), context))
        result.append(order[first : first + rows])
        first += rows
    return result


def padded_width(length: int, context: int) -> int:
    """Width of a batch whose widest row has `length` input tokens."""
    rounded = -(-length // ROUND_TO) * ROUND_TO
    return rounded if length > context else min(context, rounded)
