"""The faster path through the same parameters: GPT-2 with its forward and backward passes written by hand.

Activations and the weights that the matrix products read are bf16; the master parameters, their gradients, LayerNorm's
statistics, the softmax and every sum over the batch are fp32. docs/speed.md says what each part gained.

For the loop that trains through it:
- zero the gradients with `set_to_none=True`: the first micro-step of a step then renews the bf16 weights and writes
  gradients instead of adding to them; whoever keeps them (in a flat buffer, say) has to move the weights' versions
  after a change that autograd does not see, as `Replicas.step` does;
- accumulate by calling backward on `loss / grad_accum_steps` once a micro-step (under DDP's no_sync but for the last);
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
from gpt2.kernels.block import UNITS_KEPT, BlockFunction, Engine, Recompute, Weights, add_to, give, take
from gpt2.kernels.block import forward as block_forward
from gpt2.kernels.chunked_loss import ChunkedLoss
from gpt2.kernels.head import Fp8Head, Head, eight_bit_obstacle, try_products
from gpt2.model.gpt import GPT, IGNORE, LAYER_NORM_EPS

EVAL_CHUNK = 16_384
"""positions whose logits exist at a time when only losses are wanted: 1.6 GB in bf16"""


class _Embed(torch.autograd.Function):
    """Token and position embeddings. Last in the backward pass, it hands over the head's part of wte's gradient."""

    @staticmethod
    def forward(ctx: Any, owner: FastGPT, idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        ctx.owner = owner
        ctx.save_for_backward(idx)
        return embedding.forward(idx, wte, wpe, owner.dtype)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        (idx,) = ctx.saved_tensors
        dwte, ctx.owner.dwte = ctx.owner.dwte, None
        ctx.owner.engine.passing = None
        dwpe, holds = take(ctx.owner.wpe)
        if not holds:
            dwpe.zero_()
        embedding.backward_(dx, idx, dwte, dwpe)
        return None, None, give(dwte), give(dwpe)


class _Head(torch.autograd.Function):
    """The last LayerNorm, the tied head and the mean cross-entropy."""

    @staticmethod
    def forward(ctx: Any, owner: FastGPT, x: Tensor, targets: Tensor, *parameters: Tensor) -> Tensor:
        h, mean, rstd = layer_norm.forward(x, owner.ln_f.weight, owner.ln_f.bias, LAYER_NORM_EPS)
        scored = (targets != IGNORE).sum().to(torch.promote_types(x.dtype, torch.float32)).clamp_min(1)
        losses, ctx.from_head = owner.head.losses(h, targets, scored)
        ctx.owner = owner
        ctx.save_for_backward(x, mean, rstd)
        return losses.sum() / scored

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        owner, (x, mean, rstd) = ctx.owner, ctx.saved_tensors
        from_head, ctx.from_head = ctx.from_head, None
        owner.dwte, holds = take(owner.wte)
        dh = owner.head.backward(from_head, owner.dwte, holds, dloss)
        del from_head
        dx, dweight, dbias, dx_sum = layer_norm.backward(dh, None, x, mean, rstd, owner.ln_f.weight, scale=dloss)
        owner.engine.passing = dx, dx_sum
        dweight, dbias = add_to([owner.ln_f.weight, owner.ln_f.bias], [dweight, dbias])
        return None, dx, None, dweight, dbias, None


class FastGPT(nn.Module):
    """(idx (B, T), targets (B, T)) -> mean loss, over the parameters of `model`; DDP may wrap it.

    Args:
        recompute: what the backward pass computes again; None decides by the memory that is free at the first batch.
        dtype: of activations and matrix products; the parameters' own in tests.
        head: how the head's products are made.
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
        self.dwte: Tensor | None = None  # wte's gradient on its way from the head to the embedding
        self._products, self._recompute = products, recompute
        self._engine: Engine | None = None
        self._versions: list[int] = []
        vectors = (".ln_", "ln_f", "wpe")  # read as they are
        self._masters: list[Tensor] = [
            p for name, p in model.named_parameters() if not any(part in name for part in vectors)
        ]
        self._copies = [p.detach() if p.dtype == dtype else torch.empty_like(p, dtype=dtype) for p in self._masters]
        copies = dict(zip(self._masters, self._copies, strict=True))
        self.head = head(products, copies[self.wte], self.config.vocab_size)
        self._blocks = [Weights(block, copies) for block in model.blocks]

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "no batch has been seen yet"
        return self._engine

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the targets that are not -1, in nats."""
        if not torch.is_grad_enabled():
            return self.token_losses(idx, targets).sum() / (targets != IGNORE).sum()
        self._prepare(idx)
        x = _Embed.apply(self, idx, self.wte, self.wpe)
        for w in self._blocks:
            x = BlockFunction.apply(x, w, self.engine, idx.size(0), *w.matrices, *w.vectors)
        return _Head.apply(self, x, targets.flatten(), self.ln_f.weight, self.ln_f.bias, self.wte)

    @torch.no_grad()
    def hidden(self, idx: Tensor) -> Tensor:
        """Hidden states after the last LayerNorm, (B, T) -> (B, T, C)."""
        self._prepare(idx)
        x = embedding.forward(idx, self.wte, self.wpe, self.dtype)
        for w in self._blocks:
            x, _ = block_forward(x, w, self.engine, idx.size(0))
        h, _, _ = layer_norm.forward(x, self.ln_f.weight, self.ln_f.bias, LAYER_NORM_EPS)
        return h.view(*idx.shape, -1)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Losses (B, T) fp32 in nats, 0 where the target is -1; stands in for `scoring.token_losses`."""
        h, flat = self.hidden(idx).flatten(0, 1), targets.flatten()
        losses = [
            cross_entropy.losses(self.engine.linear.forward(part, self.head.weight), wanted, self.config.vocab_size)
            for part, wanted in zip(h.split(EVAL_CHUNK), flat.split(EVAL_CHUNK), strict=True)
        ]
        return torch.cat(losses).view_as(targets)

    def _prepare(self, idx: Tensor) -> None:
        B, T = idx.shape
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T:,} tokens does not fit into block_size {self.config.block_size:,}")
        if self._engine is None:
            backend = attention.choose(self.config.n_head, self.config.n_embd, B, T, self.wte.device)
            self._engine = Engine(self._products, backend, self._recompute or self._that_fits(B * T))
        # Between the micro-steps of one step the weights stand still. A step begins with no gradient; whoever changes
        # weights without that moves their version.
        versions = [p._version for p in self._masters]
        if self.wte.grad is None or not torch.is_grad_enabled() or versions != self._versions:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._masters)
            self.head.renew()
            self._versions = [p._version for p in self._masters]

    def _that_fits(self, tokens: int) -> Recompute:
        if self.wte.device.type != "cuda":
            return "none"
        free, _ = torch.cuda.mem_get_info(self.wte.device)
        free += torch.cuda.memory_reserved(self.wte.device) - torch.cuda.memory_allocated(self.wte.device)
        free -= 4 * self.config.n_params() if self.wte.grad is None else 0  # gradients; the moments lie there already
        levels: tuple[Recompute, ...] = ("none", "cheap")
        return next((level for level in levels if self._bytes(tokens, level) < 0.95 * free), "block")

    def _bytes(self, tokens: int, recompute: Recompute) -> int:
        return activation_bytes(self.config, tokens, recompute, self.head.bytes_a_logit)


def activation_bytes(
    config: ModelConfig, tokens: int, recompute: Recompute = "none", bytes_a_logit: int = Head.bytes_a_logit
) -> int:
    """Memory of one micro-batch, beside the parameters and what belongs to them: what the blocks keep, the logits, and
    what one block needs while it runs."""
    unit = 2 * tokens * config.n_embd
    blocks = config.n_layer * (UNITS_KEPT[recompute] * unit + tokens * (4 * config.n_head + 16))
    return blocks + bytes_a_logit * tokens * config.padded_vocab_size + 16 * unit


class Reference(nn.Module):
    """The plain path: the model itself, its products in bf16 by autocast where `precision` is bf16."""

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
    """The fastest path on this machine: a module (idx (B, T), targets (B, T)) -> mean loss over `model`'s parameters.

    FastGPT on a GPU that has bf16 (Ampere and later) and Triton; else the plain path, compiled on a GPU unless
    runtime.compile is false; on a CPU, ChunkedLoss. What stands in the way of the fast one is said once, on stderr.
    """
    bf16 = runtime.precision == "bf16" or (runtime.precision == "auto" and device.type == "cuda")
    plain = Reference(model, device, bf16)
    if runtime.kernels == "reference":
        if runtime.compile is True:
            plain.compile()
        return plain
    if device.type != "cuda":
        return plain if bf16 or runtime.sharding == "fsdp" else ChunkedLoss(model)
    obstacle = _obstacle(model, runtime, device, bf16)
    if obstacle is None:
        recompute: dict[bool | str, Recompute | None] = {True: "block", False: "none", "auto": None}
        products = _products(device)
        kind = head_kind(model.config, device, products) if fp8_head else Head
        return FastGPT(model, products, recompute[runtime.activation_checkpointing], head=kind)
    print(f"the plain path is used, not the fast one: {obstacle}", file=sys.stderr)
    model.checkpoint_blocks = runtime.activation_checkpointing is True
    if runtime.compile is not False and triton_or_none.AVAILABLE:
        plain.compile()
    return plain


def _products(device: torch.device) -> linear.Linear:
    try:
        return linear.FusedLinear(device)
    except (cublaslt.CublasLtError, AttributeError) as error:
        print(f"matrix products by torch, their surroundings in passes of their own: {error}", file=sys.stderr)
        return linear.Linear()


def head_kind(config: ModelConfig, device: torch.device, products: linear.Linear) -> type[Head]:
    """Fp8Head, or the plain one with what stands in the way of 8 bits said on stderr."""
    obstacle = eight_bit_obstacle(config, device)
    if obstacle is None and not isinstance(products, linear.FusedLinear):
        obstacle = "cuBLASLt is not used"
    if obstacle is None:
        try:
            try_products(products, device)
        except cublaslt.CublasLtError as error:
            obstacle = str(error)
    if obstacle is None:
        return Fp8Head
    print(f"the head stays in bf16: {obstacle}", file=sys.stderr)
    return Head


def _obstacle(model: GPT, runtime: Runtime, device: torch.device, bf16: bool) -> str | None:
    """Why FastGPT cannot be used, or None."""
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
    try:  # whether Triton finds a compiler and a driver that it can work with
        ones = torch.ones(2, model.config.n_embd, device=device, dtype=torch.bfloat16)
        layer_norm.forward(ones, ones[0], ones[0], LAYER_NORM_EPS)
        torch.cuda.synchronize(device)
    except Exception as error:
        return f"Triton does not work here ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None
