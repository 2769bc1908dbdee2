"""Triton where it is installed: a stand-in with the same names where it is not, so that kernels can be written at
module level and are merely never launched."""

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

    class _Absent:
        """Lets `@triton.jit` and the annotations `tl.constexpr` of a kernel be read; nothing can be run."""

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

    triton = tl = _Absent()

INTERPRETED = environment("TRITON_INTERPRET") == "1"
"""Triton runs its kernels in Python, on a CPU: slow, for tests"""


def usable(tensor: Tensor) -> bool:
    """Whether the Triton version of a function can take this tensor."""
    return AVAILABLE and (tensor.is_cuda or INTERPRETED)
