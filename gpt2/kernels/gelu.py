"""GELU in GPT-2's tanh form and its gradient: 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of Triton kernels are Triton's own types)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.kernels.triton_or_none import tl, triton, usable

BLOCK = 4096


def forward(u: Tensor) -> Tensor:
    """gelu(u) of u's shape and type, u contiguous."""
    if not usable(u):
        return F.gelu(u, approximate="tanh")
    out = torch.empty_like(u)
    _gelu_forward[(triton.cdiv(u.numel(), BLOCK),)](u, out, u.numel(), BLOCK=BLOCK, num_warps=8)
    return out


def backward(da: Tensor, u: Tensor) -> Tensor:
    """The gradient of u from the gradient `da` of gelu(u); overwrites and returns `da`."""
    if not usable(u):
        return da.copy_(torch.ops.aten.gelu_backward(da, u, approximate="tanh"))
    _gelu_backward[(triton.cdiv(u.numel(), BLOCK),)](da, u, u.numel(), BLOCK=BLOCK, num_warps=8)
    return da


@triton.jit
def _tanh_of_inner(u):
    inner = 0.7978845608028654 * u * (1.0 + 0.044715 * u * u)
    return 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0  # for very negative u, exp overflows to inf, which gives -1


@triton.jit
def gelu(u):
    """gelu of fp32 u, for other kernels too."""
    return 0.5 * u * (1.0 + _tanh_of_inner(u))


@triton.jit
def _gelu_forward(u, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(u + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    tl.store(out + offsets, gelu(x).to(out.dtype.element_ty), mask=offsets < n)


@triton.jit
def _gelu_backward(da, u, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(u + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    d = tl.load(da + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    t = _tanh_of_inner(x)
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    tl.store(da + offsets, (d * slope).to(da.dtype.element_ty), mask=offsets < n)
