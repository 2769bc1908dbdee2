"""Cross-entropy over logits with padded columns; its gradient overwrites the logits or goes to another tensor."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of Triton kernels are Triton's own types)

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.kernels.triton_or_none import tl, triton, usable
from gpt2.model.gpt import IGNORE

BLOCK, WARPS = 16384, 32
"""logits per iteration and warps per program: large, so that the rows of all running programs fit into the L2 cache"""


def losses(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    divisor: Tensor | None = None,
    gradient: Tensor | None = None,
    rounding_bias: float = 1.0,
) -> Tensor:
    """-log softmax(logits[:, :vocab_size])[target] of each row, in nats; 0 where the target is IGNORE.

    Args:
        logits: (N, V) contiguous, V >= vocab_size.
        targets: (N,) int64.
        divisor: one fp32 element. If given, also computes the gradient of sum(losses) / divisor, 0 in padded columns.
        gradient: output for the gradient, (N, V) contiguous; None overwrites the logits. They are unchanged otherwise.
        rounding_bias: expected factor that rounding to the gradient's type applies to the softmax; divided out before.

    Returns:
        (N,) fp32 (fp64 for fp64 logits).
    """
    N, V = logits.shape
    output = logits if gradient is None else gradient
    if not usable(logits):
        wide = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
        out = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
        if divisor is not None:
            p = wide.softmax(1)
            index = targets.clamp_min(0)[:, None]
            target_grad = p.gather(1, index) - 1
            p = (p / rounding_bias).scatter_(1, index, target_grad)
            p *= (targets != IGNORE)[:, None] / divisor
            output.zero_()
            output[:, :vocab_size] = p.to(output.dtype)
        return out
    out = torch.empty(N, dtype=torch.float32, device=logits.device)
    _cross_entropy[(N,)](
        logits, targets, out, out if divisor is None else divisor, output, VOCAB=vocab_size, V=V,
        GRADIENT=divisor is not None, LOG2_BIAS=math.log2(rounding_bias), IGNORED=IGNORE,
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
    LOG2_BIAS: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    UNMASKED: tl.constexpr = VOCAB // BLOCK * BLOCK  # blocks below this index hold no padding and need no mask
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    logits += row * V
    gradient += row * V
    target = tl.load(targets + row)
    is_scored = target != IGNORED
    target_logit = tl.load(logits + target, mask=is_scored, other=0.0).to(tl.float32)
    # Exponentials are relative to the first block's maximum, not the row's: this saves one pass. If a later logit is so
    # much larger that the sum overflows, the sum is recomputed below relative to the row's maximum.
    first = tl.load(logits + lanes, mask=lanes < VOCAB, other=float("-inf")).to(tl.float32)
    reference = tl.max(first, axis=0) * LOG2E
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, UNMASKED, BLOCK):
        sums += tl.exp2(tl.load(logits + start + lanes).to(tl.float32) * LOG2E - reference)
    if UNMASKED < VOCAB:
        v = tl.load(logits + UNMASKED + lanes, mask=UNMASKED + lanes < VOCAB, other=float("-inf")).to(tl.float32)
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
    lse = tl.log2(total) + reference  # base 2, like `reference`
    tl.store(out + row, tl.where(is_scored, lse / LOG2E - target_logit, 0.0))
    if GRADIENT:
        scale = tl.where(is_scored, 1.0 / tl.load(divisor), 0.0)
        shift = lse - tl.log2(scale)  # exp2(v - shift) is the probability times the scale; 0 where the scale is 0
        shift_others = shift + LOG2_BIAS  # for all columns but the target's
        for start in range(0, UNMASKED, BLOCK):  # the row is still in the L2 cache
            v = tl.load(logits + start + lanes).to(tl.float32)
            tl.store(gradient + start + lanes, tl.exp2(v * LOG2E - shift_others).to(gradient.dtype.element_ty))
        for start in range(UNMASKED, V, BLOCK):
            cols = start + lanes
            v = tl.load(logits + cols, mask=cols < VOCAB, other=float("-inf")).to(tl.float32)
            tl.store(gradient + cols, tl.exp2(v * LOG2E - shift_others).to(gradient.dtype.element_ty), mask=cols < V)
        tl.debug_barrier()  # the target's column is written last
        target_grad = tl.exp2(target_logit * LOG2E - shift) - scale
        tl.store(gradient + target, target_grad.to(gradient.dtype.element_ty), mask=is_scored)
