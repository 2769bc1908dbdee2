"""The tied head with its cross-entropy: from hidden states to losses, and to the gradients of both factors."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.config.train import ModelConfig
from gpt2.kernels import cross_entropy, fp8
from gpt2.kernels.linear import Linear

Saved = tuple[Tensor, ...]


class Head:
    """The logits in the type of the hidden states; the gradient takes their place.

    Args:
        weight: (V, C), of the hidden states' type, V padded.
    """

    name = "as the rest"
    bytes_a_logit = 2
    """at the peak, in bf16"""
    bytes_a_weight = 0
    """beside the weight itself"""

    def __init__(self, products: Linear, weight: Tensor, vocab_size: int) -> None:
        self.products, self.weight, self.vocab_size = products, weight, vocab_size

    def renew(self) -> None:
        """To be called when the weight has changed."""

    def losses(self, h: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Saved]:
        """Losses (N,) of h (N, C) in nats, 0 where the target is IGNORE, and what `backward` needs.

        Args:
            scored: one element, the number of scored rows.
        """
        logits = self.products.forward(h, self.weight)  # (N, V)
        return cross_entropy.losses(logits, targets, self.vocab_size, scored), (logits, h)

    def backward(self, saved: Saved, dweight: Tensor, accumulate: bool, dloss: Tensor) -> Tensor:
        """dweight (V, C) = or += the weight's gradient of dloss * mean loss; h's (N, C), without dloss, is returned."""
        dlogits, h = saved
        self.products.weight_grad_(dweight, accumulate, dlogits, h, scale=dloss)
        return self.products.input_grad(dlogits, self.weight)


class Fp8Head(Head):
    """The same with the factors of its three products in 8 bits, each scaled by its largest element.

    Hidden states and weight are rounded to e4m3 (4 bits of precision), the gradient of the logits to e5m2 (3 bits, down
    to 2e-9; nothing below 2e-10); sums are fp32, the logits bf16, the weight's gradient fp32. This is as in "FP8
    Formats for Deep Learning" (arXiv:2209.05433), except that the gradient's scale is fixed, since no element of
    softmax - target is larger than 1, and that what rounding would take from the softmax is given back beforehand.
    """

    name = "fp8"
    bytes_a_logit = 3  # the logits and their gradient; then that and its transpose
    bytes_a_weight = 2  # rows and columns
    MULTIPLE = 16
    """of the sizes of 8-bit products (cuBLASLt)"""

    def __init__(self, products: Linear, weight: Tensor, vocab_size: int) -> None:
        super().__init__(products, weight, vocab_size)
        self._weight8: fp8.Scaled | None = None
        # what the gradients are divided by, and so the largest: a power of two below the largest that e5m2 holds
        self._unit = torch.tensor(2.0**-15, device=weight.device)

    def renew(self) -> None:
        self._weight8 = None

    def losses(self, h: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Saved]:
        if h.size(0) % self.MULTIPLE:
            raise ValueError(f"8-bit products take multiples of {self.MULTIPLE} rows, not {h.size(0):,}")
        if self._weight8 is None:
            self._weight8 = fp8.scaled(self.weight)
        h8, weight8 = fp8.scaled(h), self._weight8
        logits = h.new_empty(h.size(0), self.weight.size(0))
        self.products.fp8_(logits, h8.rows, weight8.rows, h8.scale * weight8.scale, fast=True)
        gradient = torch.empty_like(logits, dtype=fp8.GRADIENT)
        losses = cross_entropy.losses(logits, targets, self.vocab_size, self._unit, gradient, fp8.GRADIENT_KEEPS)
        return losses, (gradient, self._unit / scored, h8.columns, h8.scale, weight8.columns, weight8.scale)

    def backward(self, saved: Saved, dweight: Tensor, accumulate: bool, dloss: Tensor) -> Tensor:
        gradient, unit, h_columns, h_scale, weight_columns, weight_scale = saved
        dh = self.weight.new_empty(h_columns.size(1), h_columns.size(0))
        self.products.fp8_(dh, gradient, weight_columns, unit * weight_scale)
        turned = fp8.transposed(gradient)
        self.products.fp8_(dweight, turned, h_columns, unit * h_scale * dloss, accumulate=accumulate)
        return dh


def eight_bit_obstacle(config: ModelConfig, device: torch.device) -> str | None:
    """Why a GPU or a model cannot have an Fp8Head, or None."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no 8-bit floats"
    sizes = {"n_embd": config.n_embd, "block_size": config.block_size}  # the vocabulary is padded to 128
    odd = next((name for name, size in sizes.items() if size % Fp8Head.MULTIPLE), None)
    return odd and f"{odd} {sizes[odd]:,} is not a multiple of {Fp8Head.MULTIPLE}"


def try_products(products: Linear, device: torch.device) -> None:
    """Make a small product of each of an Fp8Head's three kinds.

    Raises:
        CublasLtError: there is no algorithm for one of them.
    """
    N, C, V = 64, 64, 256
    h, weight = (torch.ones(rows, C, dtype=torch.bfloat16, device=device) for rows in (N, V))
    head = Fp8Head(products, weight, V)
    targets, one = torch.zeros(N, dtype=torch.int64, device=device), torch.ones((), device=device)
    _, saved = head.losses(h, targets, one)
    for accumulate in (False, True):
        head.backward(saved, torch.zeros(V, C, device=device), accumulate, one)
