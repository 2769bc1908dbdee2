"""Causal self-attention on the packed output of c_attn, (B, T, 3 C), by the fastest library.

q, k and v are strided views of that output; nothing is permuted. cuDNN's own frontend also writes the three gradients
into one packed buffer; torch's operators return three tensors that are then packed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from gpt2.kernels import autotune_cache
from gpt2.kernels.cublaslt import time_ms

Saved = tuple[Any, ...]
aten = torch.ops.aten


def split_qkv(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, nh, T, hs) of q, k and v in the packed (B, T, 3 C)."""
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).unbind(2)  # each (B, T, nh, hs)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class AttentionBackend:
    """The formula in plain PyTorch, and the interface of the other backends.

    `saved` is what `backward` needs besides qkv and the output.
    """

    name = "math"

    def __init__(self, n_head: int) -> None:
        self.n_head = n_head

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """(B, T, 3 C) -> (B, T, C), saved."""
        q, k, v = split_qkv(qkv, self.n_head)
        p = self._probabilities(q, k)
        return (p @ v).transpose(1, 2).reshape(*qkv.shape[:2], -1), ()

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        """The gradient (B, T, 3 C) of qkv from dy (B, T, C)."""
        q, k, v = split_qkv(qkv, self.n_head)
        p = self._probabilities(q, k)
        do = self._split_heads(dy)
        dp = do @ v.transpose(2, 3)
        ds = p * (dp - (dp * p).sum(3, keepdim=True)) * q.size(-1) ** -0.5
        return self._pack(ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ do)

    def _split_heads(self, y: Tensor) -> Tensor:
        """(B, T, C) -> a view (B, nh, T, hs)"""
        return y.view(*y.shape[:2], self.n_head, -1).transpose(1, 2)

    def _pack(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """Three (B, nh, T, hs) -> (B, T, 3 C)"""
        return torch.stack([dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)], dim=2).flatten(2)

    @staticmethod
    def _probabilities(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * q.size(-1) ** -0.5  # (B, nh, T, T)
        future = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(3)


class FlashAttention(AttentionBackend):
    """FlashAttention-2 as shipped with torch; needs Ampere or later."""

    name = "flash"

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = split_qkv(qkv, self.n_head)
        y, *saved = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        return y.transpose(1, 2).flatten(2), tuple(saved)

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        q, k, v = split_qkv(qkv, self.n_head)
        lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return self._pack(
            *aten._scaled_dot_product_flash_attention_backward(
                self._split_heads(dy),
                q,
                k,
                v,
                self._split_heads(y),
                lse,
                cum_q,
                cum_k,
                max_q,
                max_k,
                0.0,
                True,
                seed,
                offset,
            )
        )


class CudnnAttention(AttentionBackend):
    """cuDNN's fused attention through torch."""

    name = "cudnn"

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = split_qkv(qkv, self.n_head)
        y, *saved = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
        return y.transpose(1, 2).flatten(2), tuple(saved)

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        q, k, v = split_qkv(qkv, self.n_head)
        lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return self._pack(
            *aten._scaled_dot_product_cudnn_attention_backward(
                self._split_heads(dy),
                q,
                k,
                v,
                self._split_heads(y),
                lse,
                seed,
                offset,
                None,
                cum_q,
                cum_k,
                max_q,
                max_k,
                0.0,
                True,
            )
        )


class CudnnPackedAttention(AttentionBackend):
    """cuDNN's fused attention through nvidia-cudnn-frontend, which can write packed gradients."""

    name = "cudnn-packed"

    def __init__(self, n_head: int) -> None:
        super().__init__(n_head)
        import cudnn  # type: ignore[import-not-found, unused-ignore]

        self._cudnn: Any = cudnn
        self._handle = cudnn.create_handle()
        self._graphs: dict[tuple[int, ...], tuple[Any, ...]] = {}
        self._workspace: Tensor | None = None

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        B, T, C3 = qkv.shape
        graph, names = self._graph(B, T, C3, backward=False)
        y = qkv.new_empty(B, T, C3 // 3)
        lse = torch.empty(B, self.n_head, T, 1, dtype=torch.float32, device=qkv.device)
        self._run(graph, names, (*self._pointers(qkv), y.data_ptr(), lse.data_ptr()), qkv.device)
        return y, (lse,)

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        B, T, C3 = qkv.shape
        graph, names = self._graph(B, T, C3, backward=True)
        dqkv = torch.empty_like(qkv)
        pointers = (*self._pointers(qkv), y.data_ptr(), saved[0].data_ptr(), dy.data_ptr(), *self._pointers(dqkv))
        self._run(graph, names, pointers, qkv.device)
        return dqkv

    @staticmethod
    def _pointers(qkv: Tensor) -> tuple[int, int, int]:
        step = qkv.size(2) // 3 * qkv.element_size()
        return qkv.data_ptr(), qkv.data_ptr() + step, qkv.data_ptr() + 2 * step

    def _run(self, graph: Any, names: tuple[Any, ...], pointers: tuple[int, ...], device: torch.device) -> None:
        size = max(graph.get_workspace_size(), 1)
        if self._workspace is None or self._workspace.numel() < size:
            self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(dict(zip(names, pointers, strict=True)), self._workspace.data_ptr(), handle=self._handle)

    def _graph(self, B: int, T: int, C3: int, backward: bool) -> tuple[Any, tuple[Any, ...]]:
        key = (B, T, C3, backward)
        if key not in self._graphs:
            self._graphs[key] = self._build(B, T, C3, backward)
        graph, names = self._graphs[key]
        return graph, names

    def _build(self, B: int, T: int, C3: int, backward: bool) -> tuple[Any, tuple[Any, ...]]:
        """Build cuDNN's graph of one pass over (B, T), with the kernel that its heuristic ranks first."""
        cudnn, nh = self._cudnn, self.n_head
        hs = C3 // 3 // nh
        dim, packed, contiguous = [B, nh, T, hs], [T * C3, hs, C3, 1], [T * nh * hs, hs, nh * hs, 1]
        bf16, fp32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=bf16, intermediate_data_type=fp32, compute_data_type=fp32, handle=self._handle
        )
        q, k, v = (graph.tensor(name=name, dim=dim, stride=packed, data_type=bf16) for name in "qkv")
        options = {"q": q, "k": k, "v": v, "attn_scale": hs**-0.5, "use_causal_mask": True}
        if backward:
            o, do = (graph.tensor(name=name, dim=dim, stride=contiguous, data_type=bf16) for name in ("o", "do"))
            stats = graph.tensor(name="stats", dim=[B, nh, T, 1], stride=[nh * T, T, 1, 1], data_type=fp32)
            gradients = graph.sdpa_backward(
                name="sdpa_backward", o=o, dO=do, stats=stats,
                use_deterministic_algorithm=torch.are_deterministic_algorithms_enabled(), **options,
            )  # fmt: skip
            for gradient in gradients:
                gradient.set_output(True).set_dim(dim).set_stride(packed).set_data_type(bf16)
            names = (q, k, v, o, stats, do, *gradients)
        else:
            o, stats = graph.sdpa(name="sdpa", is_inference=False, **options)
            o.set_output(True).set_dim(dim).set_stride(contiguous).set_data_type(bf16)
            stats.set_output(True).set_dim([B, nh, T, 1]).set_stride([nh * T, T, 1, 1]).set_data_type(fp32)
            names = (q, k, v, o, stats)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()  # the first one: measured as the fastest of three or four at every size
        return graph, names


class CudnnFlash4Attention(CudnnPackedAttention):
    """cuDNN forward, FlashAttention-4 (flash-attn-4) backward: the faster of each on an H100 (docs/speed.md)."""

    name = "cudnn+flash4"

    def __init__(self, n_head: int) -> None:
        super().__init__(n_head)
        warnings.filterwarnings("ignore", module="cutlass")  # they concern flash-attn-4's code
        from flash_attn.cute.interface import _flash_attn_bwd  # type: ignore[import-not-found, unused-ignore]

        self._backward: Any = _flash_attn_bwd

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        shape = (*y.shape[:2], self.n_head, -1)
        dqkv = torch.empty_like(qkv)
        q, k, v = qkv.view(*y.shape[:2], 3, self.n_head, -1).unbind(2)  # each (B, T, nh, hs)
        dq, dk, dv = dqkv.view(*y.shape[:2], 3, self.n_head, -1).unbind(2)
        lse = saved[0].squeeze(3)  # (B, nh, T), natural logarithm in both libraries
        self._backward(q, k, v, y.view(shape), dy.view(shape), lse, causal=True, dq=dq, dk=dk, dv=dv)
        return dqkv


BACKENDS = {kind.name: kind for kind in (CudnnFlash4Attention, CudnnPackedAttention, CudnnAttention, FlashAttention)}

DETERMINISTIC = ("cudnn-packed", "flash")
"""backends whose backward pass has a bitwise reproducible mode"""


def select_backend(n_head: int, n_embd: int, B: int, T: int, device: torch.device) -> AttentionBackend:
    """The fastest backend for forward plus backward at (B, T) on this GPU; the formula on a CPU.

    Uses the result of an earlier start if it is in the autotune cache. Skips backends that the GPU or the installation
    lacks, and uses the formula if all are skipped. With deterministic algorithms, takes the first working backend of
    DETERMINISTIC, because measurements vary.
    """
    if device.type != "cuda":
        return AttentionBackend(n_head)
    key = {"what": "attention", "heads": n_head, "width": n_embd, "batch": B, "length": T, **_versions(device)}
    qkv = torch.randn(B, T, 3 * n_embd, device=device, dtype=torch.bfloat16)
    dy = torch.randn(B, T, n_embd, device=device, dtype=torch.bfloat16)

    def forward_backward(backend: AttentionBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            y, saved = backend.forward(qkv)
            return backend.backward(dy, qkv, y, saved)

        return run

    try:
        reference = forward_backward(FlashAttention(n_head))()  # part of every torch with CUDA, and the longest in use
    except RuntimeError as error:
        print(f"attention uses the plain formula: {str(error).splitlines()[0]}", file=sys.stderr)
        return AttentionBackend(n_head)
    cached = BACKENDS.get(autotune_cache.load(key) or "")
    if cached is not None:
        with suppress(Exception):  # a library has changed: measured again below
            backend = cached(n_head)
            _check_gradient(forward_backward(backend)(), reference)
            return backend
    times: dict[str, float] = {}
    backends: dict[str, AttentionBackend] = {}
    deterministic = torch.are_deterministic_algorithms_enabled()
    for name, kind in BACKENDS.items():
        if deterministic and (times or name not in DETERMINISTIC):
            continue
        try:
            backends[name] = kind(n_head)
            _check_gradient(forward_backward(backends[name])(), reference)
            times[name] = time_ms(forward_backward(backends[name]))
        except Exception as error:  # any exception of a missing or unsuitable library: try the next backend
            if not isinstance(error, ImportError):
                print(f"attention backend {name} does not work here: {str(error).splitlines()[0]}", file=sys.stderr)
    if not times:
        return AttentionBackend(n_head)
    fastest = min(times, key=times.__getitem__)
    autotune_cache.store(key, fastest)
    return backends[fastest]


def _versions(device: torch.device) -> dict[str, object]:
    """The GPU and the library versions that the fastest backend depends on."""
    versions: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    for package in ("nvidia-cudnn-frontend", "flash-attn-4", "nvidia-cutlass-dsl"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _check_gradient(gradient: Tensor, reference: Tensor) -> None:
    """Raise RuntimeError if the gradient differs from FlashAttention-2's: a new library version may be wrong."""
    error = float((gradient.float() - reference.float()).norm() / reference.float().norm())
    if not error < 0.02:  # bf16 rounding alone gives about 0.003
        raise RuntimeError(f"its gradients differ from FlashAttention-2's by {error:.1e} of their norm")
