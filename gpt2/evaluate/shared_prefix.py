"""Forward pass over alternatives with a common prefix: one row holds the prefix once, then each alternative's rest.

An attention mask lets a token attend to the prefix and to the earlier tokens of its own alternative, and positions
count from the start of the alternative. Each hidden state therefore equals that of the alternative alone, up to
rounding. HellaSwag's 3,285,300 input tokens become 1,731,888.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gpt2.evaluate.packing import Rows, Segments, padded_width
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import forward_with_attention

PREFIX, PADDING = 0, -1  # values in PackedBatch.branch


class PackedBatch(NamedTuple):
    """A batch of B rows, right-padded to T, with N scored tokens."""

    idx: Tensor  # (B, T) token ids
    positions: Tensor  # (B, T) position of each token in its alternative
    branch: Tensor  # (B, T) number of the alternative, from 1; PREFIX or PADDING
    scored: Tensor  # (N,) indices into the flattened (B T,) positions that predict a scored token
    targets: Tensor  # (N,) the tokens to predict
    segment: NDArray[np.int64]  # (N,) index of the segment
    branched: bool  # whether any row has a common prefix

    def to(self, device: torch.device) -> PackedBatch:
        """Copy to `device`."""
        idx, positions, branch, scored, targets = (tensor.to(device) for tensor in self[:5])
        return PackedBatch(idx, positions, branch, scored, targets, self.segment, self.branched)


def pack_batch(tokens: NDArray[np.uint16], segments: Segments, rows: Rows, context: int) -> PackedBatch:
    """Pack one batch: `rows` are those of the batch, `segments` those of all batches."""
    shape = len(rows.first), padded_width(int(rows.width.max()), context)
    idx, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    branch = np.full(shape, PADDING, np.int64)
    scored_at, targets, segment_of = [], [], []
    for row, (first, count, shared, _) in enumerate(zip(*(column.tolist() for column in rows), strict=True)):
        begin = int(segments.begin[first])
        idx[row, :shared] = tokens[begin : begin + shared]
        positions[row, :shared] = np.arange(shared)
        branch[row, :shared] = PREFIX
        at = shared
        for number, segment in enumerate(range(first, first + count), start=1):
            begin, end, scored = (int(column[segment]) for column in segments[1:])
            length = end - begin - 1
            own = slice(at, at + length - shared)
            idx[row, own] = tokens[begin + shared : end - 1]
            positions[row, own] = np.arange(shared, length)
            branch[row, own] = number
            inside = np.arange(length - scored, length)  # indices of the segment's inputs that predict a scored token
            scored_at.append(row * shape[1] + np.where(inside < shared, inside, inside - shared + at))
            targets.append(tokens[end - scored : end].astype(np.int64))
            segment_of.append(np.full(scored, segment))
            at = own.stop
    return PackedBatch(
        idx=torch.from_numpy(idx),
        positions=torch.from_numpy(positions),
        branch=torch.from_numpy(branch),
        scored=torch.from_numpy(np.concatenate(scored_at)),
        targets=torch.from_numpy(np.concatenate(targets)),
        segment=np.concatenate(segment_of),
        branched=bool(rows.shared.any()),
    )


@torch.no_grad()
def hidden_states(model: GPT, batch: PackedBatch) -> Tensor:
    """Hidden states (B, T, C) after the last LayerNorm."""
    if not batch.branched:
        return model.hidden(batch.idx)
    T = batch.idx.size(1)
    same = batch.branch[:, None, :] == batch.branch[:, :, None]  # (B, T, T): query, key
    causal = torch.ones(T, T, dtype=torch.bool, device=batch.idx.device).tril()
    mask = (causal & (same | (batch.branch[:, None, :] == PREFIX)))[:, None]  # (B, 1, T, T)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return forward_with_attention(model, batch.idx, batch.positions, attend)
