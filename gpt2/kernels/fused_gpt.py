"""GPT-2's training step with hand-written forward and backward passes, over the parameters of a `GPT`.

This second forward pass exists for speed: it trains faster than the compiled reference (docs/speed.md, part by part).

Activations and the weights that matrix products read are bf16; master parameters, their gradients, LayerNorm
statistics, softmax and sums over the batch are fp32.

Requirements on the training loop:
- `zero_grad(set_to_none=True)`: the first micro-step of a step then refreshes the bf16 weights and overwrites gradients
  instead of accumulating. Code that keeps `.grad` (such as a flat buffer) must increment the weights' version counters
  after an update that autograd does not see, as `Replicas.step` does.
- gradient accumulation: backward on `loss / grad_accum_steps` per micro-step (with DDP's no_sync except for the last);
- `torch.optim.AdamW(..., fused=True)`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig
from gpt2.kernels import attention, cross_entropy, cublaslt, embedding, layer_norm, linear, triton_or_none
from gpt2.kernels.block import (
    UNITS_SAVED,
    BlockFunction,
    BlockWeights,
    Kernels,
    Recompute,
    accumulate_grads,
    as_new_tensor,
    grad_buffer,
)
from gpt2.kernels.block import forward as block_forward
from gpt2.kernels.chunked_loss import ChunkedLossGPT
from gpt2.kernels.head import Fp8Head, Head, fp8_unsupported_reason, try_fp8_products
from gpt2.model.gpt import GPT, IGNORE, LAYER_NORM_EPS

EVAL_CHUNK = 16_384
"""positions per chunk of logits when no gradient is computed: 1.6 GB in bf16"""


class _Embed(torch.autograd.Function):
    """Token and position embeddings. Its backward pass runs last and completes wte's gradient, begun by the head."""

    @staticmethod
    def forward(ctx: Any, model: FusedGPT, idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        ctx.model = model
        ctx.save_for_backward(idx)
        return embedding.forward(idx, wte, wpe, model.dtype)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        (idx,) = ctx.saved_tensors
        dwte, ctx.model.dwte = ctx.model.dwte, None
        ctx.model.kernels.last_dx = None
        dwpe, accumulate = grad_buffer(ctx.model.wpe)
        if not accumulate:
            dwpe.zero_()
        embedding.backward_(dx, idx, dwte, dwpe)
        return None, None, as_new_tensor(dwte), as_new_tensor(dwpe)


class _Head(torch.autograd.Function):
    """The last LayerNorm, the tied head and the mean cross-entropy."""

    @staticmethod
    def forward(ctx: Any, model: FusedGPT, x: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        h, mean, rstd = layer_norm.forward(x, model.ln_f.weight, model.ln_f.bias, LAYER_NORM_EPS)
        scored = (targets != IGNORE).sum().to(torch.promote_types(x.dtype, torch.float32)).clamp_min(1)
        losses, ctx.head_saved = model.head.losses(h, targets, scored)
        ctx.model = model
        ctx.save_for_backward(x, mean, rstd)
        return losses.sum() / scored

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        model, (x, mean, rstd) = ctx.model, ctx.saved_tensors
        head_saved, ctx.head_saved = ctx.head_saved, None
        model.dwte, accumulate = grad_buffer(model.wte)
        dh = model.head.backward(head_saved, model.dwte, accumulate, dloss)
        del head_saved
        dx, dweight, dbias, dx_sum = layer_norm.backward(dh, None, x, mean, rstd, model.ln_f.weight, scale=dloss)
        model.kernels.last_dx = dx, dx_sum
        dweight, dbias = accumulate_grads([model.ln_f.weight, model.ln_f.bias], [dweight, dbias])
        return None, dx, None, dweight, dbias, None


class FusedGPT(nn.Module):
    """(idx (B, T), targets (B, T)) -> mean loss in nats, on the parameters of `model`; can be wrapped in DDP.

    Args:
        recompute: what the backward pass recomputes; None: decided by the free memory at the first batch.
        dtype: of activations and matrix products.
        head: bf16 or 8-bit products in the head.
    """

    def __init__(
        self,
        model: GPT,
        products: linear.Linear,
        recompute: Recompute | None = None,
        dtype: torch.dtype = torch.bfloat16,
        head: type[Head] = Head,
    ) -> None:
        super().__init__()
        self.model, self.config, self.dtype = model, model.config, dtype
        self.wte, self.wpe, self.ln_f = (
            model.transformer.wte.weight,
            model.transformer.wpe.weight,
            model.transformer.ln_f,
        )
        self.dwte: Tensor | None = None  # the head's part of wte's gradient, until the embedding adds its own
        self._products, self._recompute = products, recompute
        self._kernels: Kernels | None = None
        self._versions: list[int] = []
        fp32 = (".ln_", "ln_f", "wpe")  # used without a copy
        self._masters: list[Tensor] = [
            p for name, p in model.named_parameters() if not any(part in name for part in fp32)
        ]
        self._copies = [p.detach() if p.dtype == dtype else torch.empty_like(p, dtype=dtype) for p in self._masters]
        copies = dict(zip(self._masters, self._copies, strict=True))
        self.head = head(products, copies[self.wte], self.config.vocab_size)
        self._blocks = [BlockWeights(block, copies) for block in model.blocks]

    @property
    def kernels(self) -> Kernels:
        assert self._kernels is not None, "available after the first batch"
        return self._kernels

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the targets that are not -1, in nats."""
        if not torch.is_grad_enabled():
            return self.token_losses(idx, targets).sum() / (targets != IGNORE).sum()
        self._prepare(idx)
        x = _Embed.apply(self, idx, self.wte, self.wpe)
        for w in self._blocks:
            x = BlockFunction.apply(x, w, self.kernels, idx.size(0), *w.matrices, *w.vectors)
        return _Head.apply(self, x, targets.flatten(), self.ln_f.weight, self.ln_f.bias, self.wte)

    @torch.no_grad()
    def hidden(self, idx: Tensor) -> Tensor:
        """Hidden states after the last LayerNorm, (B, T) -> (B, T, C)."""
        self._prepare(idx)
        x = embedding.forward(idx, self.wte, self.wpe, self.dtype)
        for w in self._blocks:
            x, _ = block_forward(x, w, self.kernels, idx.size(0))
        h, _, _ = layer_norm.forward(x, self.ln_f.weight, self.ln_f.bias, LAYER_NORM_EPS)
        return h.view(*idx.shape, -1)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Losses (B, T) fp32 in nats, 0 where the target is -1; replaces `scoring.token_losses`."""
        h = self.hidden(idx).flatten(0, 1)
        losses = [
            cross_entropy.losses(
                self.kernels.linear.forward(h_chunk, self.head.weight), target_chunk, self.config.vocab_size
            )
            for h_chunk, target_chunk in zip(h.split(EVAL_CHUNK), targets.flatten().split(EVAL_CHUNK), strict=True)
        ]
        return torch.cat(losses).view_as(targets)

    def _prepare(self, idx: Tensor) -> None:
        B, T = idx.shape
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T:,} tokens does not fit into block_size {self.config.block_size:,}")
        if self._kernels is None:
            backend = attention.select_backend(self.config.n_head, self.config.n_embd, B, T, self.wte.device)
            self._kernels = Kernels(self._products, backend, self._recompute or self._recompute_to_fit(B * T))
        # Weights do not change between the micro-steps of a step. A step starts without gradients, or with new version
        # counters of the weights.
        versions = [p._version for p in self._masters]
        if self.wte.grad is None or not torch.is_grad_enabled() or versions != self._versions:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._masters)
            self.head.weight_changed()
            self._versions = [p._version for p in self._masters]

    def _recompute_to_fit(self, tokens: int) -> Recompute:
        if self.wte.device.type != "cuda":
            return "none"
        free, _ = torch.cuda.mem_get_info(self.wte.device)
        free += torch.cuda.memory_reserved(self.wte.device) - torch.cuda.memory_allocated(self.wte.device)
        free -= (
            4 * self.config.n_params() if self.wte.grad is None else 0
        )  # gradients; the moments are already allocated
        levels: tuple[Recompute, ...] = ("none", "cheap")
        return next((level for level in levels if self._bytes(tokens, level) < 0.95 * free), "block")

    def _bytes(self, tokens: int, recompute: Recompute) -> int:
        return activation_bytes(self.config, tokens, recompute, self.head.bytes_per_logit)


def activation_bytes(
    config: ModelConfig, tokens: int, recompute: Recompute = "none", bytes_per_logit: int = Head.bytes_per_logit
) -> int:
    """Bytes of one micro-batch: the blocks' saved activations, the logits, and one block's temporaries. Excludes
    parameters, gradients and optimizer state."""
    unit = 2 * tokens * config.n_embd
    blocks = config.n_layer * (UNITS_SAVED[recompute] * unit + tokens * (4 * config.n_head + 16))
    return blocks + bytes_per_logit * tokens * config.padded_vocab_size + 16 * unit


class ReferenceGPT(nn.Module):
    """(idx (B, T), targets (B, T)) -> mean loss by the reference model, with autocast to bf16 if `bf16`."""

    def __init__(self, model: GPT, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self._device, self._bf16 = device.type, bf16

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bf16):
            loss = self.model(idx, targets)[1]
        assert isinstance(loss, Tensor)
        return loss


def accelerate(model: GPT, runtime: Runtime, device: torch.device, *, fp8_head: bool = False) -> nn.Module:
    """The fastest loss module on this machine: (idx (B, T), targets (B, T)) -> mean loss, on `model`'s parameters.

    FusedGPT on a GPU with bf16 (Ampere or later) and Triton; ChunkedLossGPT in fp32 on a CPU; otherwise ReferenceGPT,
    compiled on a GPU unless runtime.compile is false. On a GPU, prints to stderr why FusedGPT is not used.
    """
    bf16 = runtime.precision == "bf16" or (runtime.precision == "auto" and device.type == "cuda")
    plain = ReferenceGPT(model, device, bf16)
    if runtime.kernels == "reference":
        if runtime.compile is True:
            plain.compile()
        return plain
    if device.type != "cuda":
        return plain if bf16 or runtime.sharding == "fsdp" else ChunkedLossGPT(model)
    reason = _unsupported_reason(model, runtime, device, bf16)
    if reason is None:
        recompute: dict[bool | str, Recompute | None] = {True: "block", False: "none", "auto": None}
        products = _products(device)
        kind = head_kind(model.config, device, products) if fp8_head else Head
        return FusedGPT(model, products, recompute[runtime.activation_checkpointing], head=kind)
    print(f"the fused kernels are not used, but the reference model: {reason}", file=sys.stderr)
    model.checkpoint_blocks = runtime.activation_checkpointing is True
    if runtime.compile is not False and triton_or_none.AVAILABLE:
        plain.compile()
    return plain


def _products(device: torch.device) -> linear.Linear:
    try:
        return linear.FusedLinear(device)
    except (cublaslt.CublasLtError, AttributeError) as error:
        print(f"cuBLASLt is not used, but torch's matrix products, without fused epilogues: {error}", file=sys.stderr)
        return linear.Linear()


def head_kind(config: ModelConfig, device: torch.device, products: linear.Linear) -> type[Head]:
    """Fp8Head if supported; else Head, with the reason on stderr."""
    reason = fp8_unsupported_reason(config, device)
    if reason is None and not isinstance(products, linear.FusedLinear):
        reason = "cuBLASLt is not used"
    if reason is None:
        try:
            try_fp8_products(products, device)
        except cublaslt.CublasLtError as error:
            reason = str(error)
    if reason is None:
        return Fp8Head
    print(f"the head stays in bf16: {reason}", file=sys.stderr)
    return Head


def _unsupported_reason(model: GPT, runtime: Runtime, device: torch.device, bf16: bool) -> str | None:
    """Why FusedGPT cannot be used, or None."""
    if not bf16:
        return "precision is fp32"
    if runtime.sharding == "fsdp":
        return "the parameters are sharded"
    if not triton_or_none.AVAILABLE:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, bf16 needs 8.0"
    if model.config.n_embd % 8:
        return f"n_embd {model.config.n_embd} is not a multiple of 8"
    try:  # tests whether Triton finds a working compiler and driver
        ones = torch.ones(2, model.config.n_embd, device=device, dtype=torch.bfloat16)
        layer_norm.forward(ones, ones[0], ones[0], LAYER_NORM_EPS)
        torch.cuda.synchronize(device)
    except Exception as error:
        return f"Triton does not work here ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None
