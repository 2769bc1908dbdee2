"""The tied head with its cross-entropy: from hidden states to losses, and to the gradients of both factors."""

from __future__ import annotations

import torch
from torch import Tensor

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

    def __init__(self, products: Linear, weight: Tensor, vocab_size: int) -> None:
        self.products, self.weight, self.vocab_size = products, weight, vocab_size

    def renew(self) -> None:
        """To be called when the weight has changed."""

    def losses(self, h: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Saved]:
        """Losses (N,) of h (N, C) in nats, 0 where the target is IGNORE, and what `backward` needs beside h.

        Args:
            scored: one element, the number of scored rows.
        """
        logits = self.products.forward(h, self.weight)  # (N, V)
        return cross_entropy.losses(logits, targets, self.vocab_size, scored), (logits,)

    def backward(self, saved: Saved, h: Tensor, dweight: Tensor, accumulate: bool, dloss: Tensor) -> Tensor:
        """dweight (V, C) = or += the weight's gradient of dloss * mean loss; h's (N, C), without dloss, is returned."""
        (dlogits,) = saved
        self.products.weight_grad_(dweight, accumulate, dlogits, h, scale=dloss)
        return self.products.input_grad(dlogits, self.weight)


class Fp8Head(Head):
    """The same with the factors of its three products in 8 bits, each scaled by its largest element.

    Hidden states and weight are rounded to e4m3 (4 bits of precision), the gradient of the logits to e5m2 (3 bits, but
    down to 1e-9 of a row's largest); sums are fp32, the logits bf16, the weight's gradient fp32. This is as in
    "FP8 Formats for Deep Learning" (arXiv:2209.05433), except that the gradient's scale is fixed: no element of
    softmax - target is larger than 1.
    """

    name = "fp8"
    bytes_a_logit = 3  # the logits and their gradient; then that and its transpose
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
            return super().losses(h, targets, scored)
        if self._weight8 is None:
            self._weight8 = fp8.scaled(self.weight)
        h8, weight8 = fp8.scaled(h), self._weight8
        logits = h.new_empty(h.size(0), self.weight.size(0))
        self.products.fp8_(logits, h8.rows, weight8.rows, h8.scale * weight8.scale, fast=True)
        gradient = torch.empty_like(logits, dtype=fp8.GRADIENT)
        losses = cross_entropy.losses(logits, targets, self.vocab_size, self._unit, gradient)
        return losses, (gradient, self._unit / scored, h8.columns, h8.scale, weight8.columns, weight8.scale)

    def backward(self, saved: Saved, h: Tensor, dweight: Tensor, accumulate: bool, dloss: Tensor) -> Tensor:
        if len(saved) == 1:
            return super().backward(saved, h, dweight, accumulate, dloss)
        gradient, unit, h_columns, h_scale, weight_columns, weight_scale = saved
        dh = self.products.fp8_(torch.empty_like(h), gradient, weight_columns, unit * weight_scale)
        turned = fp8.transposed(gradient)
        self.products.fp8_(dweight, turned, h_columns, unit * h_scale * dloss, accumulate=accumulate)
        return dh
