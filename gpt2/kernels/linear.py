"""The linear layers of a block, forward and backward, with bias, residual and GELU fused into the matrix products.

`FusedLinear` uses cuBLASLt epilogues; `Linear` computes the same with separate torch operators. Weight gradients
accumulate in the type of the output buffer: fp32 for bf16 factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2.kernels import gelu
from gpt2.kernels.cublaslt import BIAS, DGELU, GELU_AUX_BIAS, CublasLt


class Linear:
    """Plain PyTorch. Weights are (out, in), activations (N, features)."""

    name = "torch"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x weight^T + bias + residual: (N, in) -> (N, out)."""
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        return y if residual is None else y.add_(residual)

    def forward_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """u = x weight^T + bias and gelu(u), both (N, out)."""
        u = self.forward(x, weight, bias)
        return u, gelu.forward(u)

    def input_grad(self, dy: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """scale * dy weight: (N, out) -> (N, in)."""
        dx = torch.mm(dy, weight)
        return dx if scale is None else dx.mul_(scale)

    def input_grad_gelu(self, dy: Tensor, weight: Tensor, u: Tensor) -> Tensor:
        """The gradient of u, where gelu(u) is the layer's input: (N, out) -> (N, in)."""
        return gelu.backward(self.input_grad(dy, weight), u)

    def weight_grad_(
        self, dweight: Tensor, accumulate: bool, dy: Tensor, x: Tensor, scale: Tensor | None = None
    ) -> None:
        """dweight (out, in) = or += scale * dy^T x."""
        if dy.is_cuda and dweight.dtype != dy.dtype:
            product = torch.mm(dy.t(), x, out_dtype=dweight.dtype)
        else:
            product = torch.mm(dy.t().to(dweight.dtype), x.to(dweight.dtype))
        if scale is not None:
            product *= scale
        if accumulate:
            dweight += product
        else:
            dweight.copy_(product)

    def fp8_(
        self, out: Tensor, a: Tensor, b: Tensor, scale: Tensor, *, accumulate: bool = False, fast: bool = False
    ) -> Tensor:
        """out (M, N) = or += scale * a b^T with 8-bit a (M, K) and b (N, K); returns out.

        Args:
            scale: one fp32 element on the device.
            fast: allow accumulation with fewer bits than fp32 (about 14 on Hopper); for K up to a few thousand.
        """
        wide = torch.promote_types(out.dtype, torch.float32)
        product = a.to(wide) @ b.to(wide).t() * scale
        return out.add_(product) if accumulate else out.copy_(product)


class FusedLinear(Linear):
    """cuBLASLt with epilogues; measures the algorithms of each product at its first use."""

    name = "cublaslt"

    def __init__(self, device: torch.device) -> None:
        self._lt = CublasLt(device)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.size(0), weight.size(0))
        if bias is None:
            return self._lt.matmul(x, weight, out, trans_b=True, add=residual)
        return self._lt.matmul(x, weight, out, trans_b=True, add=residual, epilogue=BIAS, bias=bias)

    def forward_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        u, a = (x.new_empty(x.size(0), weight.size(0)) for _ in range(2))
        self._lt.matmul(x, weight, a, trans_b=True, epilogue=GELU_AUX_BIAS, bias=bias, aux=u)
        return u, a

    def input_grad(self, dy: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        return self._lt.matmul(dy, weight, dy.new_empty(dy.size(0), weight.size(1)), scale=scale)

    def input_grad_gelu(self, dy: Tensor, weight: Tensor, u: Tensor) -> Tensor:
        return self._lt.matmul(dy, weight, torch.empty_like(u), epilogue=DGELU, aux=u)

    def weight_grad_(
        self, dweight: Tensor, accumulate: bool, dy: Tensor, x: Tensor, scale: Tensor | None = None
    ) -> None:
        self._lt.matmul(dy, x, dweight, trans_a=True, add=dweight if accumulate else None, scale=scale)

    def fp8_(
        self, out: Tensor, a: Tensor, b: Tensor, scale: Tensor, *, accumulate: bool = False, fast: bool = False
    ) -> Tensor:
        return self._lt.matmul(a, b, out, trans_b=True, add=out if accumulate else None, scale=scale, fast=fast)
