"""Causal self-attention on the packed output of c_attn, (B, T, 3 C), by whichever library is fastest.

q, k and v are read where c_attn left them, through strides; nothing is permuted. cuDNN called through its own
front end also writes the three gradients into one packed buffer; torch's operators return three tensors to be packed.
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

from gpt2.kernels import autotune_cache as choices
from gpt2.kernels.cublaslt import milliseconds

Saved = tuple[Any, ...]
aten = torch.ops.aten


def heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, nh, T, hs) of q, k and v in the packed (B, T, 3 C)."""
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).unbind(2)  # each (B, T, nh, hs)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Attention:
    """The plain version, by the formula; also the interface of the others.

    `saved` is what forward hands to backward beside qkv and the output.
    """

    name = "math"

    def __init__(self, n_head: int) -> None:
        self.n_head = n_head

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """(B, T, 3 C) -> (B, T, C), saved."""
        q, k, v = heads(qkv, self.n_head)
        p = self._probabilities(q, k)
        return (p @ v).transpose(1, 2).reshape(*qkv.shape[:2], -1), ()

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        """The gradient (B, T, 3 C) of qkv from dy (B, T, C)."""
        q, k, v = heads(qkv, self.n_head)
        p = self._probabilities(q, k)
        do = self._split(dy)
        dp = do @ v.transpose(2, 3)
        ds = p * (dp - (dp * p).sum(3, keepdim=True)) * q.size(-1) ** -0.5
        return self._packed(ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ do)

    def _split(self, y: Tensor) -> Tensor:
        """(B, T, C) -> a view (B, nh, T, hs)"""
        return y.view(*y.shape[:2], self.n_head, -1).transpose(1, 2)

    def _packed(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """Three (B, nh, T, hs) -> (B, T, 3 C)"""
        return torch.stack([dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)], dim=2).flatten(2)

    @staticmethod
    def _probabilities(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * q.size(-1) ** -0.5  # (B, nh, T, T)
        above = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(above, float("-inf")).softmax(3)


class FlashAttention(Attention):
    """FlashAttention-2 as torch ships it: Ampere and later."""

    name = "flash"

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = heads(qkv, self.n_head)
        y, *saved = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        return y.transpose(1, 2).flatten(2), tuple(saved)

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        q, k, v = heads(qkv, self.n_head)
        lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return self._packed(
            *aten._scaled_dot_product_flash_attention_backward(
                self._split(dy), q, k, v, self._split(y), lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset
            )
        )


class CudnnAttention(Attention):
    """cuDNN's fused attention as torch calls it."""

    name = "cudnn"

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = heads(qkv, self.n_head)
        y, *saved = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
        return y.transpose(1, 2).flatten(2), tuple(saved)

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        q, k, v = heads(qkv, self.n_head)
        lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return self._packed(
            *aten._scaled_dot_product_cudnn_attention_backward(
                self._split(dy), q, k, v, self._split(y), lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True
            )
        )


class CudnnPackedAttention(Attention):
    """cuDNN's fused attention through nvidia-cudnn-frontend, which lets the gradients be written packed."""

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
        self._run(graph, names, (*self._parts(qkv), y.data_ptr(), lse.data_ptr()), qkv.device)
        return y, (lse,)

    def backward(self, dy: Tensor, qkv: Tensor, y: Tensor, saved: Saved) -> Tensor:
        B, T, C3 = qkv.shape
        graph, names = self._graph(B, T, C3, backward=True)
        dqkv = torch.empty_like(qkv)
        pointers = (*self._parts(qkv), y.data_ptr(), saved[0].data_ptr(), dy.data_ptr(), *self._parts(dqkv))
        self._run(graph, names, pointers, qkv.device)
        return dqkv

    @staticmethod
    def _parts(qkv: Tensor) -> tuple[int, int, int]:
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
        """Describe one pass over (B, T) to cuDNN and let it choose its kernel."""
        cudnn, nh = self._cudnn, self.n_head
        hs = C3 // 3 // nh
        dim, packed, alone = [B, nh, T, hs], [T * C3, hs, C3, 1], [T * nh * hs, hs, nh * hs, 1]
        bf16, fp32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=bf16, intermediate_data_type=fp32, compute_data_type=fp32, handle=self._handle
        )
        q, k, v = (graph.tensor(name=name, dim=dim, stride=packed, data_type=bf16) for name in "qkv")
        options = {"q": q, "k": k, "v": v, "attn_scale": hs**-0.5, "use_causal_mask": True}
        if backward:
            o, do = (graph.tensor(name=name, dim=dim, stride=alone, data_type=bf16) for name in ("o", "do"))
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
            o.set_output(True).set_dim(dim).set_stride(alone).set_data_type(bf16)
            stats.set_output(True).set_dim([B, nh, T, 1]).set_stride([nh * T, T, 1, 1]).set_data_type(fp32)
            names = (q, k, v, o, stats)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()  # the first: measured, it was the quickest of the three or four at every size
        return graph, names


class CudnnFlash4Attention(CudnnPackedAttention):
    """cuDNN forward, FlashAttention-4 (flash-attn-4) backward: each is the quicker one on an H100 (docs/speed.md)."""

    name = "cudnn+flash4"

    def __init__(self, n_head: int) -> None:
        super().__init__(n_head)
        warnings.filterwarnings("ignore", module="cutlass")  # about flash-attn-4's own code
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
"""whose backward pass can be told to give the same bits each time"""


def choose(n_head: int, n_embd: int, B: int, T: int, device: torch.device) -> Attention:
    """The backend that is quickest forward and backward at (B, T) on this GPU; the formula on a CPU.

    What was found at an earlier start stands (`choices`). Those that the GPU or the installation does not have are
    passed over; if all are, the formula is used. Where torch is asked for deterministic algorithms, the first that
    works of those that have one: measurements are not the same twice.
    """
    if device.type != "cuda":
        return Attention(n_head)
    question = {"what": "attention", "heads": n_head, "width": n_embd, "batch": B, "length": T, **_versions(device)}
    qkv = torch.randn(B, T, 3 * n_embd, device=device, dtype=torch.bfloat16)
    dy = torch.randn(B, T, n_embd, device=device, dtype=torch.bfloat16)

    def both_ways(backend: Attention) -> Callable[[], Tensor]:
        def run() -> Tensor:
            y, saved = backend.forward(qkv)
            return backend.backward(dy, qkv, y, saved)

        return run

    times: dict[str, float] = {}
    made: dict[str, Attention] = {}
    try:
        known = both_ways(FlashAttention(n_head))()  # in every torch with CUDA, and the longest in use
    except RuntimeError as error:
        print(f"attention by its formula: {str(error).splitlines()[0]}", file=sys.stderr)
        return Attention(n_head)
    kept = BACKENDS.get(choices.recall(question) or "")
    if kept is not None:
        with suppress(Exception):  # what it is made of has changed since: measured again below
            backend = kept(n_head)
            _agree(both_ways(backend)(), known)
            return backend
    exact = torch.are_deterministic_algorithms_enabled()
    for name, kind in BACKENDS.items():
        if exact and (times or name not in DETERMINISTIC):
            continue
        try:
            made[name] = kind(n_head)
            _agree(both_ways(made[name])(), known)
            times[name] = milliseconds(both_ways(made[name]))
        except Exception as error:  # whatever an absent or unfit library raises: the next one is tried
            if not isinstance(error, ImportError):
                print(f"attention by {name} does not work here: {str(error).splitlines()[0]}", file=sys.stderr)
    if not times:
        return Attention(n_head)
    fastest = min(times, key=times.__getitem__)
    choices.remember(question, fastest)
    return made[fastest]


def _versions(device: torch.device) -> dict[str, object]:
    """Of what a choice of attention depends on."""
    versions: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    for package in ("nvidia-cudnn-frontend", "flash-attn-4", "nvidia-cutlass-dsl"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _agree(gradient: Tensor, known: Tensor) -> None:
    """Libraries change under us: one whose gradients are not those of another is not used, however fast it is."""
    error = float((gradient.float() - known.float()).norm() / known.float().norm())
    if not error < 0.02:  # bf16 itself makes about 0.003
        raise RuntimeError(f"its gradients differ from FlashAttention-2's by {error:.1e} of their norm")
