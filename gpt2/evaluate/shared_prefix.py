"""Alternatives that begin alike, read in one row: the common beginning once, then what is each one's own.

A token sees the common beginning and, of the rest, what stands before it in its own alternative; positions count as if
each alternative stood alone. So every hidden state is what it would be alone, up to rounding, and the beginning costs
once what it would cost for each: of HellaSwag's 3,285,300 input tokens 1,731,888 are left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gpt2.evaluate.packing import Rows, Segments, padded
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import forward_with_attention

COMMON, PADDING = 0, -1  # in Layout.branch


class Layout(NamedTuple):
    """A batch of B rows, padded on the right to T, of which N tokens are scored."""

    idx: Tensor  # (B, T) token ids
    places: Tensor  # (B, T) each token's position in its own sequence
    branch: Tensor  # (B, T) which alternative of the row, counted from 1; COMMON, PADDING
    chosen: Tensor  # (N,) of the flattened (B T,) places, those that predict a scored token
    targets: Tensor  # (N,) the tokens to predict
    segment: NDArray[np.int64]  # (N,) to which each belongs
    branched: bool  # whether any row has a common beginning

    def to(self, device: torch.device) -> Layout:
        """The same on `device`."""
        idx, places, branch, chosen, targets = (part.to(device) for part in self[:5])
        return Layout(idx, places, branch, chosen, targets, self.segment, self.branched)


def lay_out(tokens: NDArray[np.uint16], segments: Segments, rows: Rows, context: int) -> Layout:
    """Lay out one batch: `rows` are those of the batch alone, `segments` all there are."""
    shape = len(rows.first), padded(int(rows.width.max()), context)
    idx, places = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    branch = np.full(shape, PADDING, np.int64)
    chosen, targets, owners = [], [], []
    for row, (first, count, shared, _) in enumerate(zip(*(column.tolist() for column in rows), strict=True)):
        begin = int(segments.begin[first])
        idx[row, :shared] = tokens[begin : begin + shared]
        places[row, :shared] = np.arange(shared)
        branch[row, :shared] = COMMON
        at = shared
        for number, segment in enumerate(range(first, first + count), start=1):
            begin, end, scored = (int(column[segment]) for column in segments[1:])
            length = end - begin - 1
            own = slice(at, at + length - shared)
            idx[row, own] = tokens[begin + shared : end - 1]
            places[row, own] = np.arange(shared, length)
            branch[row, own] = number
            inside = np.arange(length - scored, length)  # which of the segment's inputs predict
            chosen.append(row * shape[1] + np.where(inside < shared, inside, inside - shared + at))
            targets.append(tokens[end - scored : end].astype(np.int64))
            owners.append(np.full(scored, segment))
            at = own.stop
    return Layout(
        idx=torch.from_numpy(idx),
        places=torch.from_numpy(places),
        branch=torch.from_numpy(branch),
        chosen=torch.from_numpy(np.concatenate(chosen)),
        targets=torch.from_numpy(np.concatenate(targets)),
        segment=np.concatenate(owners),
        branched=bool(rows.shared.any()),
    )


@torch.no_grad()
def hidden(model: GPT, batch: Layout) -> Tensor:
    """Hidden states (B, T, C) after the last LayerNorm; by the model itself where each row is one segment."""
    if not batch.branched:
        return model.hidden(batch.idx)
    T = batch.idx.size(1)
    alike = batch.branch[:, None, :] == batch.branch[:, :, None]  # (B, T, T): query, key
    before = torch.ones(T, T, dtype=torch.bool, device=batch.idx.device).tril()
    mask = (before & (alike | (batch.branch[:, None, :] == COMMON)))[:, None]  # (B, 1, T, T)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return forward_with_attention(model, batch.idx, batch.places, attend)
