"""Cross-entropy over logits whose last columns are padding, with the gradient written over the logits or beside."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton kernels are pointers and numbers of its own)

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.kernels.triton_or_none import tl, triton, usable
from gpt2.model.gpt import IGNORE

BLOCK, WARPS = 16384, 32
"""logits and warps a program works with at a time: few programs at once, so that their rows stay in the L2 cache"""


def losses(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    divisor: Tensor | None = None,
    gradient: Tensor | None = None,
    keeps: float = 1.0,
) -> Tensor:
    """-log softmax(logits[:, :vocab_size])[target] of each row, in nats; 0 where the target is IGNORE.

    Args:
        logits: (N, V) contiguous, V >= vocab_size.
        targets: (N,) int64.
        divisor: one fp32 element. If given, the gradient of sum(losses) / divisor is written, with 0 in the padded
            columns.
        gradient: where to, (N, V) contiguous; None: over the logits, which stay otherwise.
        keeps: the share of the softmax that rounding to the gradient's type leaves: it is divided by this beforehand.

    Returns:
        (N,) fp32 (fp64 for fp64 logits).
    """
    N, V = logits.shape
    place = logits if gradient is None else gradient
    if not usable(logits):
        wide = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
        out = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
        if divisor is not None:
            p = wide.softmax(1)
            at = targets.clamp_min(0)[:, None]
            own = p.gather(1, at) - 1
            p = (p / keeps).scatter_(1, at, own)
            p *= (targets != IGNORE)[:, None] / divisor
            place.zero_()
            place[:, :vocab_size] = p.to(place.dtype)
        return out
    out = torch.empty(N, dtype=torch.float32, device=logits.device)
    _cross_entropy[(N,)](
        logits, targets, out, out if divisor is None else divisor, place, VOCAB=vocab_size, V=V,
        GRADIENT=divisor is not None, LOG2_KEEPS=math.log2(keeps), IGNORED=IGNORE,
        BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _cross_entropy(
    logits,
    targets,
    out,
    divisor,
    gradient,
    VOCAB: tl.constexpr,
    V: tl.constexpr,
    GRADIENT: tl.constexpr,
    LOG2_KEEPS: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    WHOLE: tl.constexpr = VOCAB // BLOCK * BLOCK  # up to here no block holds padding, so none needs a mask
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    logits += row * V
    gradient += row * V
    target = tl.load(targets + row)
    counted = target != IGNORED
    chosen = tl.load(logits + target, mask=counted, other=0.0).to(tl.float32)
    # Exponentials are taken relative to the largest of the first block, not of the whole row: one pass less. Should
    # a later logit be so much larger that the sum overflows, it is taken again below, carefully.
    first = tl.load(logits + lanes, mask=lanes < VOCAB, other=float("-inf")).to(tl.float32)
    reference = tl.max(first, axis=0) * LOG2E
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, WHOLE, BLOCK):
        sums += tl.exp2(tl.load(logits + start + lanes).to(tl.float32) * LOG2E - reference)
    if WHOLE < VOCAB:
        v = tl.load(logits + WHOLE + lanes, mask=WHOLE + lanes < VOCAB, other=float("-inf")).to(tl.float32)
        sums += tl.exp2(v * LOG2E - reference)
    total = tl.sum(sums, axis=0)
    if total == float("inf"):
        largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        for start in range(0, VOCAB, BLOCK):
            v = tl.load(logits + start + lanes, mask=start + lanes < VOCAB, other=float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, v)
        reference = tl.max(largest, axis=0) * LOG2E
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, VOCAB, BLOCK):
            v = tl.load(logits + start + lanes, mask=start + lanes < VOCAB, other=float("-inf")).to(tl.float32)
            sums += tl.exp2(v * LOG2E - reference)
        total = tl.sum(sums, axis=0)
    lse = tl.log2(total) + reference  # to base 2, as `reference` is
    tl.store(out + row, tl.where(counted, lse / LOG2E - chosen, 0.0))
    if GRADIENT:
        scale = tl.where(counted, 1.0 / tl.load(divisor), 0.0)
        shift = lse - tl.log2(scale)  # exp2(v - shift) is the probability times the scale; 0 where the scale is 0
        others = shift + LOG2_KEEPS  # for all but the target's own place
        for start in range(0, WHOLE, BLOCK):  # the row was just read: it comes from the L2 cache
            v = tl.load(logits + start + lanes).to(tl.float32)
            tl.store(gradient + start + lanes, tl.exp2(v * LOG2E - others).to(gradient.dtype.element_ty))
        for start in range(WHOLE, V, BLOCK):
            cols = start + lanes
            v = tl.load(logits + cols, mask=cols < VOCAB, other=float("-inf")).to(tl.float32)
            tl.store(gradient + cols, tl.exp2(v * LOG2E - others).to(gradient.dtype.element_ty), mask=cols < V)
        tl.debug_barrier()  # the target's own place is written last
        own = tl.exp2(chosen * LOG2E - shift) - scale
        tl.store(gradient + target, own.to(gradient.dtype.element_ty), mask=counted)
