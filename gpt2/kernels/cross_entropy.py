"""Cross-entropy over logits whose last columns are padding, with the gradient written over the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.kernels.triton_or_none import tl, triton, usable
from gpt2.model import IGNORE


def losses(logits: Tensor, targets: Tensor, vocab_size: int, scored: Tensor | None = None) -> Tensor:
    """-log softmax(logits[:, :vocab_size])[target] of each row, in nats; 0 where the target is IGNORE.

    Args:
        logits: (N, V) contiguous, V >= vocab_size.
        targets: (N,) int64.
        scored: one fp32 element, the number of scored rows. If given, the gradient of sum(losses) / scored takes the
            place of the logits, with 0 in the padded columns; else the logits stay.

    Returns:
        (N,) fp32 (fp64 for fp64 logits).
    """
    N, V = logits.shape
    if not usable(logits):
        wide = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
        out = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
        if scored is not None:
            p = wide.softmax(1)
            p.scatter_add_(1, targets.clamp_min(0)[:, None], p.new_full((N, 1), -1.0))
            p *= (targets != IGNORE)[:, None] / scored
            logits.zero_()
            logits[:, :vocab_size] = p.to(logits.dtype)
        return out
    out = torch.empty(N, dtype=torch.float32, device=logits.device)
    _cross_entropy[(N,)](
        logits, targets, out, out if scored is None else scored, vocab_size, V, GRADIENT=scored is not None,
        IGNORED=IGNORE, BLOCK=min(8192, triton.next_power_of_2(V)), num_warps=16,
    )  # fmt: skip
    return out


@triton.jit
def _cross_entropy(logits, targets, out, scored, vocab_size, V, GRADIENT: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * V
    # the largest value and the sum of exponentials are kept for each lane, and brought together once at the end
    largest = tl.full([BLOCK], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v = tl.load(logits + cols, mask=cols < vocab_size, other=-1e30).to(tl.float32)
        higher = tl.maximum(largest, v)
        total = total * tl.exp(largest - higher) + tl.where(cols < vocab_size, tl.exp(v - higher), 0.0)
        largest = higher
    top = tl.max(largest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    counted = target != IGNORED
    chosen = tl.load(logits + target, mask=counted, other=0.0).to(tl.float32)
    tl.store(out + row, tl.where(counted, lse - chosen, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # `chosen` is read before its place is written over
        scale = tl.where(counted, 1.0 / tl.load(scored), 0.0)
        for start in range(0, V, BLOCK):  # this row was just read: it comes from the L2 cache
            cols = start + tl.arange(0, BLOCK)
            v = tl.load(logits + cols, mask=cols < vocab_size, other=-1e30).to(tl.float32)
            p = tl.exp(v - lse) - tl.where(cols == target, 1.0, 0.0)
            p = tl.where(cols < vocab_size, p * scale, 0.0)
            tl.store(logits + cols, p.to(logits.dtype.element_ty), mask=cols < V)
