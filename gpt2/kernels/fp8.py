"""Tensors of 8-bit floats for matrix products: e4m3 for what a forward pass reads, e5m2 for gradients.

8-bit products want both factors to lie along the dimension that is summed over, so a tensor that is read both ways
is kept both ways.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton kernels are pointers and numbers of its own)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.kernels.triton_or_none import tl, triton, usable

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = torch.finfo(FORWARD).max
GRADIENT_KEEPS = 0.99722
"""of the sum of many numbers p that are rounded to e5m2, if they lie as densely as p^-2: more are rounded down than up.
A softmax is like that, whether its logits are normally distributed (where its mass lies) or its probabilities go as
1 / rank. It is 0.691220 / ln 2: the integrals of round(p) p^-2 and of p^-1 over p from 1 to 2, round(p) being the
nearest of 1, 1.25, 1.5, 1.75 and 2"""
TILE = 128


class Scaled(NamedTuple):
    """A matrix x (M, N) as `rows` (M, N) and `columns` (N, M), contiguous, each x / scale in e4m3."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    """one element, on the device"""


def scaled(x: Tensor) -> Scaled:
    """x (M, N) with its largest element at the largest that e4m3 holds. Each is rounded by up to 1/16 of itself; those
    below 1/28,672 of the largest by up to 1/458,752 of that."""
    exact = torch.promote_types(x.dtype, torch.float32)
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=exact)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    if not usable(x):
        rows = (x / scale).to(FORWARD)
        return Scaled(rows, transposed(rows), scale)
    rows = torch.empty_like(x, dtype=FORWARD)
    columns = x.new_empty(x.size(1), x.size(0), dtype=FORWARD)
    _fp8_copies[_grid(x)](x, scale, rows, columns, *x.shape, ROUND=True, TILE=TILE, num_warps=4)
    return Scaled(rows, columns, scale)


def transposed(x: Tensor) -> Tensor:
    """The transpose (N, M), contiguous, of an 8-bit x (M, N)."""
    bits = x.view(torch.uint8)
    if not usable(x):
        return bits.t().contiguous().view(x.dtype)
    out = bits.new_empty(x.size(1), x.size(0))
    _fp8_copies[_grid(x)](bits, bits, bits, out, *x.shape, ROUND=False, TILE=TILE, num_warps=4)
    return out.view(x.dtype)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.size(1), TILE), triton.cdiv(x.size(0), TILE)


@triton.jit
def _fp8_copies(x, scale, rows, columns, M, N, ROUND: tl.constexpr, TILE: tl.constexpr):
    """Turns one tile of x (M, N) into `columns` (N, M); with ROUND divides it by `scale` first and keeps `rows` too."""
    m = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    n = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None] * N + n[None, :]
    v = tl.load(x + at, mask=inside)
    if ROUND:
        v = (v.to(tl.float32) / tl.load(scale)).to(rows.dtype.element_ty)
        tl.store(rows + at, v, mask=inside)
    turned = (n[:, None] < N) & (m[None, :] < M)
    tl.store(columns + n[:, None] * M + m[None, :], tl.trans(v), mask=turned)
