"""The tied head with its cross-entropy: losses from hidden states, and the gradients of both factors."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.config.train import ModelConfig
from gpt2.kernels import cross_entropy, fp8
from gpt2.kernels.linear import Linear

Saved = tuple[Tensor, ...]


class Head:
    """Computes logits in the hidden states' type; their gradient overwrites them.

    Args:
        weight: (V, C), of the hidden states' type, V padded to a multiple of 128.
    """

    name = "bf16"
    bytes_per_logit = 2
    """peak memory, in bf16"""
    bytes_per_weight = 0
    """memory besides the weight"""

    def __init__(self, products: Linear, weight: Tensor, vocab_size: int) -> None:
        self.products, self.weight, self.vocab_size = products, weight, vocab_size

    def weight_changed(self) -> None:
        """Invalidate what depends on the weight's values."""

    def losses(self, h: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Saved]:
        """Losses (N,) of h (N, C) in nats, 0 where the target is IGNORE, and the tensors that `backward` needs.

        Args:
            scored: one element, the number of scored rows.
        """
        logits = self.products.forward(h, self.weight)  # (N, V)
        return cross_entropy.losses(logits, targets, self.vocab_size, scored), (logits, h)

    def backward(self, saved: Saved, dweight: Tensor, accumulate: bool, dloss: Tensor) -> Tensor:
        """dweight (V, C) = or += gradient of dloss * mean loss; returns the gradient (N, C) of h without dloss."""
        dlogits, h = saved
        self.products.weight_grad_(dweight, accumulate, dlogits, h, scale=dloss)
        return self.products.input_grad(dlogits, self.weight)


class Fp8Head(Head):
    """Three products on 8-bit factors, each factor scaled by its largest element.

    Hidden states and weight are rounded to e4m3 (4 bits of precision), the gradient of the logits to e5m2 (3 bits, down
    to 2e-9; 0 below 2e-10); accumulation is fp32, logits are bf16, the weight's gradient fp32. This follows "FP8
    Formats for Deep Learning" (arXiv:2209.05433) with two changes: the gradient's scale is fixed, as no element of
    softmax - target is larger than 1, and the bias of rounding the softmax is corrected beforehand.
    """

    name = "fp8"
    bytes_per_logit = 3  # logits (2) + gradient (1); later gradient + its transpose
    bytes_per_weight = 2  # rows and columns
    MULTIPLE = 16
    """sizes of 8-bit products are multiples of this (cuBLASLt)"""

    def __init__(self, products: Linear, weight: Tensor, vocab_size: int) -> None:
        super().__init__(products, weight, vocab_size)
        self._weight8: fp8.ScaledMatrix | None = None
        # divides gradients, whose maximum is 1: the quotient's maximum, 2^15, is the largest power of two in e5m2
        self._unit = torch.tensor(2.0**-15, device=weight.device)

    def weight_changed(self) -> None:
        self._weight8 = None

    def losses(self, h: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Saved]:
        if h.size(0) % self.MULTIPLE:
            raise ValueError(f"8-bit products need a multiple of {self.MULTIPLE} rows, not {h.size(0):,}")
        if self._weight8 is None:
            self._weight8 = fp8.quantize(self.weight)
        h8, weight8 = fp8.quantize(h), self._weight8
        logits = h.new_empty(h.size(0), self.weight.size(0))
        self.products.fp8_(logits, h8.rows, weight8.rows, h8.scale * weight8.scale, fast=True)
        gradient = torch.empty_like(logits, dtype=fp8.GRADIENT)
        losses = cross_entropy.losses(
            logits, targets, self.vocab_size, self._unit, gradient, fp8.GRADIENT_ROUNDING_BIAS
        )
        return losses, (gradient, self._unit / scored, h8.columns, h8.scale, weight8.columns, weight8.scale)

    def backward(self, saved: Saved, dweight: Tensor, accumulate: bool, dloss: Tensor) -> Tensor:
        gradient, unit, h_columns, h_scale, weight_columns, weight_scale = saved
        dh = self.weight.new_empty(h_columns.size(1), h_columns.size(0))
        self.products.fp8_(dh, gradient, weight_columns, unit * weight_scale)
        gradient_t = fp8.transpose(gradient)
        self.products.fp8_(dweight, gradient_t, h_columns, unit * h_scale * dloss, accumulate=accumulate)
        return dh


def fp8_unsupported_reason(config: ModelConfig, device: torch.device) -> str | None:
    """Why the GPU or the model does not support an Fp8Head, or None."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no 8-bit floats"
    sizes = {"n_embd": config.n_embd, "block_size": config.block_size}  # the vocabulary is padded to 128
    name = next((name for name, size in sizes.items() if size % Fp8Head.MULTIPLE), None)
    return name and f"{name} {sizes[name]:,} is not a multiple of {Fp8Head.MULTIPLE}"


def try_fp8_products(products: Linear, device: torch.device) -> None:
    """Compute a small product of each of the three kinds in an Fp8Head.

    Raises:
        CublasLtError: no algorithm supports one of them.
    """
    N, C, V = 64, 64, 256
    h, weight = (torch.ones(rows, C, dtype=torch.bfloat16, device=device) for rows in (N, V))
    head = Fp8Head(products, weight, V)
    targets, one = torch.zeros(N, dtype=torch.int64, device=device), torch.ones((), device=device)
    _, saved = head.losses(h, targets, one)
    for accumulate in (False, True):
        head.backward(saved, torch.zeros(V, C, device=device), accumulate, one)
