"""LayerNorm over the rows of a bf16 residual stream, its statistics and sums in fp32.

The backward pass adds the gradient that passes the LayerNorm by (the residual), so that one pass over memory does both.
"""

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
    rows = 4
    _layer_norm_forward[(triton.cdiv(N, rows),)](
        x, weight, bias, y, mean, rstd, N, eps, C=C, BLOCK=triton.next_power_of_2(C), ROWS=rows, num_warps=8
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: Tensor, residual: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, plus `residual`, the gradient (N, C) that reaches x beside the LayerNorm.

    Returns:
        dx (N, C) of x's type, dweight (C,), dbias (C,) in the type of the statistics.
    """
    if not usable(x):
        wide_dy, xhat = _wide(dy), (_wide(x) - mean[:, None]) * rstd[:, None]
        g = wide_dy * weight
        dx = (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True)) * rstd[:, None]
        if residual is not None:
            dx = dx + _wide(residual)
        return dx.to(x.dtype), (wide_dy * xhat).sum(0), wide_dy.sum(0)
    N, C = x.shape
    dx = torch.empty_like(x)
    # each program walks over many rows and keeps its sums in registers; a few hundred partial sums are left
    programs = min(_programs(x.device), triton.cdiv(N, 2))
    partial = torch.empty(2, programs, C, dtype=torch.float32, device=x.device)
    _layer_norm_backward[(programs,)](
        dy, dy if residual is None else residual, x, mean, rstd, weight, dx, partial[0], partial[1], N,
        C=C, BLOCK=triton.next_power_of_2(C), ROWS=2, RESIDUAL=residual is not None, num_warps=8,
    )  # fmt: skip
    dweight, dbias = partial.sum(1)
    return dx, dweight, dbias


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _programs(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _layer_norm_forward(x, weight, bias, y, mean, rstd, N, eps, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < N) & (cols < C)
    at = rows.to(tl.int64) * C + cols
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.sum(v, axis=1, keep_dims=True) / C
    centred = tl.where(cols < C, v - m, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / C + eps)
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(y + at, (centred * r * w + b).to(y.dtype.element_ty), mask=mask)
    tl.store(mean + rows, m, mask=rows < N)
    tl.store(rstd + rows, r, mask=rows < N)


@triton.jit
def _layer_norm_backward(dy, residual, x, mean, rstd, weight, dx, dweight, dbias, N, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501
    cols = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    db = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < N) & (cols < C)
        at = rows.to(tl.int64) * C + cols
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(mean + rows, mask=rows < N, other=0.0)
        r = tl.load(rstd + rows, mask=rows < N, other=0.0)
        xhat = tl.where(cols < C, (v - m) * r, 0.0)
        g = d * w
        c1 = tl.sum(g, axis=1, keep_dims=True) / C
        c2 = tl.sum(g * xhat, axis=1, keep_dims=True) / C
        out = (g - c1 - xhat * c2) * r
        if RESIDUAL:
            out += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
        dw += d * xhat
        db += d
    here = tl.program_id(0) * C + tl.arange(0, BLOCK)
    tl.store(dweight + here, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < C)
    tl.store(dbias + here, tl.sum(db, axis=0), mask=tl.arange(0, BLOCK) < C)
