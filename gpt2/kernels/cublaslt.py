"""cuBLASLt through ctypes: matrix products with epilogues that torch does not expose.

torch loads the library but lacks GELU that also stores its input, GELU's gradient, an added residual, in-place fp32
accumulation of bf16 products, and algorithm selection by measurement. Constants and structures are from cublasLt.h,
identical in CUDA 12 and 13.

All matrices are row-major, as in torch. cuBLASLt is column-major, so it computes the transpose: row-major
D (m, n) = A B is column-major D^T (n, m) = B^T A^T.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.kernels import autotune_cache

DEFAULT, BIAS, GELU_AUX_BIAS, DGELU = 1, 4, 164, 192  # cublasLtEpilogue_t
_COMPUTE_32F, _R_32F, _R_16BF, _R_8F_E4M3, _R_8F_E5M2 = 68, 0, 14, 28, 29
_POINTER_MODE, _TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 2, 3, 4, 7, 8, 11, 12
_FAST_ACCUM, _BIAS_TYPE = 25, 26
_MAX_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t
_TYPES = {
    torch.float32: _R_32F,
    torch.bfloat16: _R_16BF,
    torch.float8_e4m3fn: _R_8F_E4M3,
    torch.float8_e5m2: _R_8F_E5M2,
}
WORKSPACE_BYTES = 64 << 20  # for split-K; NVIDIA recommends 32 MiB or more for Hopper
_ALGORITHM = struct.Struct("8Q")  # cublasLtMatmulAlgo_t; serializable for one version of the library
CANDIDATES = 8
TIE_RATIO = 1.01  # times within this factor are a tie: the library's own order decides


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLtError(RuntimeError):
    """A call returned a nonzero status, or no algorithm supports the product."""


@dataclass
class _Plan:
    """The descriptors and the algorithm of one kind of product."""

    desc: c_void_p
    layouts: tuple[c_void_p, c_void_p, c_void_p]
    algo: _Heuristic


@cache
def library() -> ctypes.CDLL | None:
    """The cuBLASLt library that torch has loaded into this process, or None."""
    try:
        maps = Path("/proc/self/maps").read_text()
        path = next(word for word in maps.split() if "libcublasLt.so" in word)
        return ctypes.CDLL(path)
    except (OSError, StopIteration):
        return None


def _check(status: int, what: str) -> None:
    if status:
        raise CublasLtError(f"{what} returned status {status}")


class CublasLt:
    """A handle with its workspace and cached plans, for one device; calls must be ordered on one stream."""

    def __init__(self, device: torch.device) -> None:
        lib = library()
        if lib is None:
            raise CublasLtError("libcublasLt is not loaded")
        self._lib = lib
        self._handle = c_void_p()
        _check(lib.cublasLtCreate(byref(self._handle)), "cublasLtCreate")
        self._gpu = torch.cuda.get_device_name(device)
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._zero_one = torch.tensor([0.0, 1.0], device=device)
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def matmul(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        trans_a: bool = False,
        trans_b: bool = False,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        epilogue: int = DEFAULT,
        bias: Tensor | None = None,
        aux: Tensor | None = None,
        fast: bool = False,
    ) -> Tensor:
        """out = epilogue(scale * op(a) @ op(b) + add); out is returned.

        Args:
            a, b: 2-D bf16 with unit stride in the last dimension, transposed by op if trans_* is set. Or 8-bit floats,
                at most one of them e5m2, with trans_b only and all sizes multiples of 16.
            out: (m, n) contiguous, bf16 or fp32.
            add: (m, n), of out's type; pass `out` itself to accumulate.
            scale: one fp32 element on the device.
            fast: for 8-bit floats, allow accumulation with fewer bits than fp32.
            epilogue: BIAS, GELU_AUX_BIAS (also writes the sum with the bias to `aux`) or DGELU (`aux` is that sum).

        Raises:
            CublasLtError: no algorithm supports this product.
        """
        m, n = out.shape
        k = a.size(0) if trans_a else a.size(1)
        key = (
            m, n, k, trans_a, trans_b, a.stride(0), b.stride(0), out.dtype, epilogue, add is not None,
            add is not None and add.data_ptr() == out.data_ptr(), scale is not None, bias is not None and bias.dtype,
            a.dtype, b.dtype, fast,
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(key, a, b, out, trans_a, trans_b, add, scale, epilogue, bias, aux, fast)
            self._plans[key] = plan
        self._set_pointers(plan.desc, bias, aux)
        self._launch(plan, a, b, out, add, scale)
        return out

    def _set(self, desc: c_void_p, attribute: int, value: ctypes._SimpleCData[Any]) -> None:
        status = self._lib.cublasLtMatmulDescSetAttribute(desc, attribute, byref(value), c_size_t(ctypes.sizeof(value)))
        _check(status, f"cublasLtMatmulDescSetAttribute({attribute})")

    def _set_pointers(self, desc: c_void_p, bias: Tensor | None, aux: Tensor | None) -> None:
        if bias is not None:
            self._set(desc, _BIAS_POINTER, c_void_p(bias.data_ptr()))
        if aux is not None:
            self._set(desc, _AUX_POINTER, c_void_p(aux.data_ptr()))

    def _layout(self, tensor: Tensor) -> c_void_p:
        layout = c_void_p()
        rows, cols, ld = c_uint64(tensor.size(1)), c_uint64(tensor.size(0)), c_int64(tensor.stride(0))
        status = self._lib.cublasLtMatrixLayoutCreate(byref(layout), c_int(_TYPES[tensor.dtype]), rows, cols, ld)
        _check(status, "cublasLtMatrixLayoutCreate")
        return layout

    def _make_plan(
        self, key: tuple[object, ...], a: Tensor, b: Tensor, out: Tensor, trans_a: bool, trans_b: bool,
        add: Tensor | None, scale: Tensor | None, epilogue: int, bias: Tensor | None, aux: Tensor | None,
        fast: bool,
    ) -> _Plan:  # fmt: skip
        desc = c_void_p()
        _check(self._lib.cublasLtMatmulDescCreate(byref(desc), c_int(_COMPUTE_32F), c_int(_R_32F)), "DescCreate")
        self._set(desc, _TRANSA, c_int32(trans_b))  # b is the library's A
        self._set(desc, _TRANSB, c_int32(trans_a))
        self._set(desc, _EPILOGUE, c_uint32(epilogue))
        if fast:
            self._set(desc, _FAST_ACCUM, c_int8(1))
        if scale is not None:
            self._set(desc, _POINTER_MODE, c_int32(1))  # alpha and beta are on the device
        if aux is not None:
            self._set(desc, _AUX_LD, c_int64(aux.stride(0)))
        if bias is not None:
            self._set(desc, _BIAS_TYPE, c_int32(_TYPES[bias.dtype]))
        self._set_pointers(desc, bias, aux)
        layouts = (self._layout(b), self._layout(a), self._layout(out))
        scratch = torch.empty_like(out) if add is not None and add.data_ptr() == out.data_ptr() else out

        def run(plan: _Plan) -> Callable[[], None]:
            return lambda: self._launch(plan, a, b, scratch, add, scale)

        cache_key = {"what": "product", "key": key, "gpu": self._gpu, "cublaslt": self._lib.cublasLtGetVersion()}
        cached = autotune_cache.load(cache_key)
        if cached is not None:
            with suppress(ValueError, struct.error, CublasLtError):  # no longer valid: measured again below
                plan = _Plan(desc, layouts, _Heuristic(algo=(c_uint64 * 8)(*_ALGORITHM.unpack(bytes.fromhex(cached)))))
                run(plan)()
                return plan
        preference = c_void_p()
        _check(self._lib.cublasLtMatmulPreferenceCreate(byref(preference)), "PreferenceCreate")
        limit = c_size_t(WORKSPACE_BYTES)
        self._lib.cublasLtMatmulPreferenceSetAttribute(preference, _MAX_WORKSPACE, byref(limit), c_size_t(8))
        candidates, count = (_Heuristic * CANDIDATES)(), c_int(0)
        status = self._lib.cublasLtMatmulAlgoGetHeuristic(
            self._handle, desc, layouts[0], layouts[1], layouts[2], layouts[2], preference, c_int(CANDIDATES),
            candidates, byref(count),
        )  # fmt: skip
        self._lib.cublasLtMatmulPreferenceDestroy(preference)
        _check(status, f"cublasLtMatmulAlgoGetHeuristic (epilogue {epilogue}, {tuple(a.shape)} x {tuple(b.shape)})")
        plans = [_Plan(desc, layouts, result) for result in candidates[: count.value] if result.state == 0]
        best = select_fastest(plans, run)
        autotune_cache.store(cache_key, _ALGORITHM.pack(*best.algo.algo).hex())
        return best

    def _launch(self, plan: _Plan, a: Tensor, b: Tensor, out: Tensor, add: Tensor | None, scale: Tensor | None) -> None:
        alpha: Any
        beta: Any
        if scale is None:
            alpha, beta = byref(c_float(1.0)), byref(c_float(add is not None))
        else:
            alpha, beta = c_void_p(scale.data_ptr()), c_void_p(self._zero_one.data_ptr() + 4 * (add is not None))
        layout_b, layout_a, layout_out = plan.layouts
        status = self._lib.cublasLtMatmul(
            self._handle, plan.desc, alpha, c_void_p(b.data_ptr()), layout_b, c_void_p(a.data_ptr()), layout_a, beta,
            c_void_p((out if add is None else add).data_ptr()), layout_out, c_void_p(out.data_ptr()), layout_out,
            byref(plan.algo), c_void_p(self._workspace.data_ptr()), c_size_t(WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        _check(status, "cublasLtMatmul")


def select_fastest(plans: list[_Plan], run: Callable[[_Plan], Callable[[], None]]) -> _Plan:
    """The first plan within TIE_RATIO of the fastest, without those that fail.

    With deterministic algorithms, the first plan that works, because measurements vary.

    Raises:
        CublasLtError: all plans fail.
    """
    times = []
    for plan in plans:
        try:
            times.append(time_ms(run(plan)))
        except CublasLtError:
            times.append(float("inf"))
    best = min(times, default=float("inf"))
    if best == float("inf"):
        raise CublasLtError("no algorithm works for this product")
    limit = sys.float_info.max if torch.are_deterministic_algorithms_enabled() else best * TIE_RATIO
    return next(plan for plan, ms in zip(plans, times, strict=True) if ms <= limit)


def time_ms(run: Callable[[], object], repeats: int = 5) -> float:
    """GPU time of one call in ms: the minimum over `repeats` calls, each timed by a pair of CUDA events."""
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in events)
