"""The sum of a matrix over its rows, in fp32: the gradient of a bias."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of Triton kernels are Triton's own types)

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.kernels.triton_or_none import tl, triton, usable

COLUMNS, ROWS = 128, 32
"""size of the tile that a program loads at a time: 256-byte segments of bf16, many loads in flight"""


def row_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum x (N, M), contiguous, over its rows: (M,) of `dtype`. The order of additions is fixed."""
    if not usable(x):
        return x.sum(0, dtype=dtype)
    N, M = x.shape
    across = triton.cdiv(M, COLUMNS)
    down = max(1, min(_programs(x.device) // across, triton.cdiv(N, ROWS)))
    partial = torch.empty(down, M, dtype=torch.float32, device=x.device)
    _row_sum[(across, down)](x, partial, N, M, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=4)
    return partial.sum(0, dtype=dtype)


def _programs(device: torch.device) -> int:
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _row_sum(x, partial, N, M, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(tl.program_id(1) * ROWS, N, tl.num_programs(1) * ROWS):
        rows = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        sums += tl.load(x + rows * M + cols, mask=(rows < N) & (cols < M), other=0.0).to(tl.float32)
    out = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(partial + tl.program_id(1) * M + out, tl.sum(sums, axis=0), mask=out < M)
