"""Triton, or a stub if it is not installed, so that modules with kernels can be imported; `usable` is then False."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpt2.machine import environment

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

    class _Stub:
        """Supports `@triton.jit` and `tl.constexpr` annotations; kernels cannot run."""

        constexpr = Any

        @staticmethod
        def jit(function: Callable[..., Any]) -> Callable[..., Any]:
            return function

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << max(n - 1, 0).bit_length()

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

    triton = tl = _Stub()

INTERPRETED = environment("TRITON_INTERPRET") == "1"
"""Triton interprets kernels on a CPU: slow, for tests"""


def usable(tensor: Tensor) -> bool:
    """Whether Triton kernels can run on this tensor."""
    return AVAILABLE and (tensor.is_cuda or INTERPRETED)
