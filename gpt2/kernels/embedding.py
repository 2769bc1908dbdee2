"""Token plus position embeddings from fp32 master weights; gradients accumulate in fp32."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of Triton kernels are Triton's own types)

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.kernels.triton_or_none import tl, triton, usable


def forward(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype) -> Tensor:
    """wte[idx] + wpe[position]: (B, T) int64 -> (B * T, C) of `dtype`, summed in the weights' type."""
    B, T = idx.shape
    C = wte.size(1)
    if not usable(wte):
        return (wte[idx] + wpe[:T]).to(dtype).view(B * T, C)
    out = torch.empty(B * T, C, dtype=dtype, device=idx.device)
    _embedding_forward[(B * T,)](idx, wte, wpe, out, T, C=C, BLOCK=triton.next_power_of_2(C), num_warps=2)
    return out


def backward_(dx: Tensor, idx: Tensor, dwte: Tensor, dwpe: Tensor) -> None:
    """Accumulate the gradients of `forward` into `dwte` (V, C) and `dwpe` (block_size, C), fp32.

    The kernel's atomic additions have no fixed order, so the last bits may differ between runs. With deterministic
    algorithms, torch's own backward pass is used, which sorts the tokens first.

    Args:
        dx: (B * T, C); idx: (B, T).
    """
    B, T = idx.shape
    C = dx.size(1)
    dwpe[:T] += dx.view(B, T, C).sum(0, dtype=dwpe.dtype)
    if torch.are_deterministic_algorithms_enabled():
        rows = dx.to(dwte.dtype)  # torch rounds the sum to the type of its input
        dwte += torch.ops.aten.embedding_dense_backward(rows, idx.flatten(), dwte.size(0), -1, False)
    elif usable(dx):
        _embedding_backward[(B * T,)](dx, idx, dwte, C=C, BLOCK=triton.next_power_of_2(C), num_warps=2)
    else:
        dwte.index_add_(0, idx.flatten(), dx.to(dwte.dtype))


@triton.jit
def _embedding_forward(idx, wte, wpe, out, T, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    token = tl.load(idx + row)
    v = tl.load(wte + token * C + cols, mask=cols < C) + tl.load(wpe + (row % T) * C + cols, mask=cols < C)
    tl.store(out + row * C + cols, v.to(out.dtype.element_ty), mask=cols < C)


@triton.jit
def _embedding_backward(dx, idx, dwte, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    token = tl.load(idx + row)
    d = tl.load(dx + row * C + cols, mask=cols < C).to(tl.float32)
    tl.atomic_add(dwte + token * C + cols, d, mask=cols < C, sem="relaxed")
