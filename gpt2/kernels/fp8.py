"""Tensors of 8-bit floats for matrix products: e4m3 for forward passes, e5m2 for gradients.

8-bit products need both factors contiguous along the summed dimension, so tensors used both ways are stored twice.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of Triton kernels are Triton's own types)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.kernels.triton_or_none import tl, triton, usable

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
FORWARD_MAX = torch.finfo(FORWARD).max
GRADIENT_ROUNDING_BIAS = 0.99722
"""Rounding to e5m2 multiplies the sum of numbers p of density p^-2 by this factor: more are rounded down than up. A
softmax has this density where its mass is if its logits are normally distributed, or if its probabilities decay as
1 / rank. The value is 0.691220 / ln 2: the integrals of round(p) p^-2 and of p^-1 over p from 1 to 2, where round(p) is
the nearest of 1, 1.25, 1.5, 1.75 and 2."""
TILE = 128


class ScaledMatrix(NamedTuple):
    """A matrix x (M, N) as `rows` (M, N) and `columns` (N, M), contiguous, each x / scale in e4m3."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    """one element, on the device"""


def quantize(x: Tensor) -> ScaledMatrix:
    """Scale x (M, N) so that its largest element is e4m3's maximum, and round it. The relative rounding error is up to
    1/16; for elements below 1/28,672 of the largest, the absolute error is up to 1/458,752 of the largest."""
    wide = torch.promote_types(x.dtype, torch.float32)
    abs_max = torch.linalg.vector_norm(x, float("inf"), dtype=wide)
    scale = abs_max.clamp_min(torch.finfo(torch.float32).tiny * FORWARD_MAX) / FORWARD_MAX
    if not usable(x):
        rows = (x / scale).to(FORWARD)
        return ScaledMatrix(rows, transpose(rows), scale)
    rows = torch.empty_like(x, dtype=FORWARD)
    columns = x.new_empty(x.size(1), x.size(0), dtype=FORWARD)
    _fp8_layouts[_grid(x)](x, scale, rows, columns, *x.shape, ROUND=True, TILE=TILE, num_warps=4)
    return ScaledMatrix(rows, columns, scale)


def transpose(x: Tensor) -> Tensor:
    """The transpose (N, M), contiguous, of an 8-bit x (M, N)."""
    bits = x.view(torch.uint8)
    if not usable(x):
        return bits.t().contiguous().view(x.dtype)
    out = bits.new_empty(x.size(1), x.size(0))
    _fp8_layouts[_grid(x)](bits, bits, bits, out, *x.shape, ROUND=False, TILE=TILE, num_warps=4)
    return out.view(x.dtype)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.size(1), TILE), triton.cdiv(x.size(0), TILE)


@triton.jit
def _fp8_layouts(x, scale, rows, columns, M, N, ROUND: tl.constexpr, TILE: tl.constexpr):
    """Transpose a tile of x (M, N) into `columns` (N, M); with ROUND, first divide by `scale`, and also write
    `rows`."""
    m = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    n = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (m[:, None] < M) & (n[None, :] < N)
    offsets = m[:, None] * N + n[None, :]
    v = tl.load(x + offsets, mask=inside)
    if ROUND:
        v = (v.to(tl.float32) / tl.load(scale)).to(rows.dtype.element_ty)
        tl.store(rows + offsets, v, mask=inside)
    inside_t = (n[:, None] < N) & (m[None, :] < M)
    tl.store(columns + n[:, None] * M + m[None, :], tl.trans(v), mask=inside_t)
