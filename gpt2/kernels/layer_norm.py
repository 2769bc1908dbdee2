"""LayerNorm over the rows of a bf16 residual stream; statistics and sums are fp32.

The backward pass also adds the residual branch's gradient, which saves one pass over memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of Triton kernels are Triton's own types)

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.kernels.triton_or_none import tl, triton, usable


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) * rstd * weight + bias over the last dimension.

    Args:
        x: (N, C), contiguous; weight, bias: (C,), usually fp32.

    Returns:
        y (N, C) of x's type, mean (N,) and rstd (N,) for `backward`, fp32 (fp64 for an fp64 x).
    """
    if not usable(x):
        wide = _wide(x)
        variance, mean = torch.var_mean(wide, dim=1, correction=0)  # (N,)
        rstd = (variance + eps).rsqrt()
        y = (wide - mean[:, None]) * rstd[:, None] * weight + bias
        return y.to(x.dtype), mean, rstd
    N, C = x.shape
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(C)
    _layer_norm_forward[(N,)](
        x, weight, bias, y, mean, rstd, eps, C=C, BLOCK=block, num_warps=max(block // 512, 1)
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: Tensor,
    residual: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`; dx includes `residual`, the gradient (N, C) of x from the residual branch.

    Args:
        scale: one fp32 element on the device; multiplies dy.

    Returns:
        dx (N, C) of x's type; dweight, dbias and the sum of dx over its rows, each (C,) in the statistics' type. That
        sum is the bias gradient of the layer whose output was added to x.
    """
    if not usable(x):
        wide_dy, xhat = _wide(dy), (_wide(x) - mean[:, None]) * rstd[:, None]
        if scale is not None:
            wide_dy = wide_dy * scale
        g = wide_dy * weight
        dx = (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True)) * rstd[:, None]
        if residual is not None:
            dx = dx + _wide(residual)
        return dx.to(x.dtype), (wide_dy * xhat).sum(0), wide_dy.sum(0), dx.sum(0)
    N, C = x.shape
    dx = torch.empty_like(x)
    # each program loops over many rows with prefetching, and keeps its sums in registers
    programs = min(_programs(x.device), N)
    partial = torch.empty(programs, 3, C, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(C)
    _layer_norm_backward[(programs,)](
        dy, dy if residual is None else residual, x, mean, rstd, weight, rstd if scale is None else scale, dx, partial,
        N, C=C, BLOCK=block, STAGES=3, RESIDUAL=residual is not None, SCALE=scale is not None,
        num_warps=max(block // 512, 1),
    )  # fmt: skip
    dweight, dbias, dx_sum = partial.sum(0)
    return dx, dweight, dbias, dx_sum


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _programs(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def normalize(v, mask, C, eps):
    """(v - mean) * rstd of a row of C fp32 elements, 0 where masked; mean; rstd."""
    m = tl.sum(v, axis=0) / C
    centred = tl.where(mask, v - m, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    return centred * r, m, r


@triton.jit
def _layer_norm_forward(x, weight, bias, y, mean, rstd, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    v = tl.load(x + row * C + cols, mask=mask, other=0.0).to(tl.float32)
    xhat, m, r = normalize(v, mask, C, eps)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * C + cols, (xhat * w + b).to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, m)
    tl.store(rstd + row, r)


@triton.jit
def _layer_norm_backward(
    dy,
    residual,
    x,
    mean,
    rstd,
    weight,
    scale,
    dx,
    partial,
    N,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        factor = tl.load(scale)
    sum_w = tl.zeros([BLOCK], dtype=tl.float32)
    sum_b = tl.zeros([BLOCK], dtype=tl.float32)
    sum_x = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        offsets = (row + tl.zeros([BLOCK], dtype=tl.int64)) * C + cols
        d = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            d *= factor
        r = tl.load(rstd + row)
        xhat = tl.where(mask, (v - tl.load(mean + row)) * r, 0.0)
        g = d * w
        c1 = tl.sum(g, axis=0) / C
        c2 = tl.sum(g * xhat, axis=0) / C
        out = tl.where(mask, (g - c1 - xhat * c2) * r, 0.0)
        if RESIDUAL:
            out += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=mask)
        sum_w += d * xhat
        sum_b += d
        sum_x += out
    sums = partial + tl.program_id(0) * 3 * C + cols
    tl.store(sums, sum_w, mask=mask)
    tl.store(sums + C, sum_b, mask=mask)
    tl.store(sums + 2 * C, sum_x, mask=mask)
