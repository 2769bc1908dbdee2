"""One transformer block with a hand-written forward and backward pass.

The matrix products accumulate parameter gradients directly into `.grad`, in fp32. The backward pass returns these sums
to autograd as the parameters' gradients (see `grad_buffer`), so hooks, such as DDP's, run on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2.kernels import gelu, layer_norm
from gpt2.kernels.attention import AttentionBackend
from gpt2.kernels.linear import Linear
from gpt2.kernels.row_sum import row_sum
from gpt2.model.gpt import LAYER_NORM_EPS, Block

Recompute = Literal["none", "cheap", "block"]
"""What the backward pass recomputes: nothing; the outputs of LayerNorm and GELU; the whole block"""

UNITS_SAVED = {"none": 16, "cheap": 10, "block": 1}
"""activations saved per block, in units of B * T * C elements"""


@dataclass
class Kernels:
    """The implementations that all blocks of a model share."""

    linear: Linear
    attention: AttentionBackend
    recompute: Recompute = "none"
    last_dx: tuple[Tensor, Tensor] | None = None
    """during a backward pass: the gradient (N, C) that the last layer returned, and its sum over the rows"""

    def bias_grad(self, dout: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of dout over its rows; reuses the sum in `last_dx` if dout is that tensor."""
        last_dx, self.last_dx = self.last_dx, None
        if last_dx is not None and last_dx[0].data_ptr() == dout.data_ptr():
            return last_dx[1]
        return row_sum(dout, dtype)


class BlockWeights:
    """A block's parameters, and the low-precision copies of matrices and biases that the products read."""

    def __init__(self, block: Block, copies: dict[Tensor, Tensor]) -> None:
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj = (
            (copies.get(layer.weight, layer.weight), copies.get(layer.bias, layer.bias)) for layer in layers
        )
        self.matrices: list[Tensor] = [layer.weight for layer in layers]
        self.vectors: list[Tensor] = [
            self.ln_1.weight, self.ln_1.bias, layers[0].bias, layers[1].bias,
            self.ln_2.weight, self.ln_2.bias, layers[2].bias, layers[3].bias,
        ]  # fmt: skip


def grad_buffer(parameter: Tensor) -> tuple[Tensor, bool]:
    """The output buffer for a parameter's gradient, and whether to accumulate into it.

    Detaches `.grad` from the parameter: autograd then stores the returned buffer as `.grad` without adding or copying.
    """
    grad, parameter.grad = parameter.grad, None
    return (torch.empty_like(parameter), False) if grad is None else (grad, True)


def as_new_tensor(grad: Tensor) -> Tensor:
    """A new tensor over the same memory, to return from a backward pass. Autograd would copy a tensor that has other
    references, such as a view into a flat gradient buffer, and leave that buffer stale."""
    return grad.view_as(grad)


def accumulate_grads(parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The parameters' `.grad`, where present, plus `gradients`; detaches `.grad` as `grad_buffer` does."""
    sums = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(sums) == len(gradients):
        torch._foreach_add_(tuple(sums), tuple(gradients))
    else:
        sums = [
            new if parameter.grad is None else parameter.grad + new
            for parameter, new in zip(parameters, gradients, strict=True)
        ]
    for parameter in parameters:
        parameter.grad = None
    return [as_new_tensor(grad) for grad in sums]


def forward(x: Tensor, w: BlockWeights, kernels: Kernels, B: int) -> tuple[Tensor, tuple[Any, ...]]:
    """The block's output (B * T, C) for its input x (B * T, C), and the activations that `backward` needs besides x."""
    N = x.size(0)
    h1, mean1, rstd1 = layer_norm.forward(x, w.ln_1.weight, w.ln_1.bias, LAYER_NORM_EPS)
    qkv = kernels.linear.forward(h1, *w.c_attn).view(B, N // B, -1)  # (B, T, 3 C)
    y, attention = kernels.attention.forward(qkv)  # (B, T, C)
    x2 = kernels.linear.forward(y.view(N, -1), *w.attn_proj, residual=x)  # (N, C)
    h2, mean2, rstd2 = layer_norm.forward(x2, w.ln_2.weight, w.ln_2.bias, LAYER_NORM_EPS)
    u, a = kernels.linear.forward_gelu(h2, *w.c_fc)  # (N, 4 C) before and after GELU
    out = kernels.linear.forward(a, *w.mlp_proj, residual=x2)  # (N, C)
    cheap = (h1, h2, a) if kernels.recompute == "none" else (None, None, None)
    return out, (*cheap, qkv, y, attention, x2, u, mean1, rstd1, mean2, rstd2)


def backward(
    dout: Tensor, x: Tensor, activations: tuple[Any, ...], w: BlockWeights, kernels: Kernels
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of x from that of the output (both (N, C)), and the accumulated ones of w.matrices, then w.vectors."""
    h1, h2, a, qkv, y, attention, x2, u, mean1, rstd1, mean2, rstd2 = activations
    linear, N = kernels.linear, x.size(0)
    buffers = [grad_buffer(matrix) for matrix in w.matrices]
    d_attn, d_attn_proj, d_fc, d_mlp_proj = buffers
    if a is None:
        a = gelu.forward(u)
    grad_dtype = w.ln_1.weight.dtype
    db_mlp_proj = kernels.bias_grad(dout, grad_dtype)
    linear.weight_grad_(*d_mlp_proj, dout, a)
    du = linear.input_grad_gelu(dout, w.mlp_proj[0], u)  # (N, 4 C)
    del a, u
    if h2 is None:
        h2, _, _ = layer_norm.forward(x2, w.ln_2.weight, w.ln_2.bias, LAYER_NORM_EPS)
    db_fc = row_sum(du, grad_dtype)
    linear.weight_grad_(*d_fc, du, h2)
    dh2 = linear.input_grad(du, w.c_fc[0])  # (N, C)
    del du, h2
    dx2, dw_ln2, db_ln2, db_attn_proj = layer_norm.backward(dh2, dout, x2, mean2, rstd2, w.ln_2.weight)
    linear.weight_grad_(*d_attn_proj, dx2, y.view(N, -1))
    dy = linear.input_grad(dx2, w.attn_proj[0]).view_as(y)
    dqkv = kernels.attention.backward(dy, qkv, y, attention).view(N, -1)  # (N, 3 C)
    if h1 is None:
        h1, _, _ = layer_norm.forward(x, w.ln_1.weight, w.ln_1.bias, LAYER_NORM_EPS)
    db_attn = row_sum(dqkv, grad_dtype)
    linear.weight_grad_(*d_attn, dqkv, h1)
    dh1 = linear.input_grad(dqkv, w.c_attn[0])  # (N, C)
    dx, dw_ln1, db_ln1, dx_sum = layer_norm.backward(dh1, dx2, x, mean1, rstd1, w.ln_1.weight)
    kernels.last_dx = dx, dx_sum
    vectors = [dw_ln1, db_ln1, db_attn, db_attn_proj, dw_ln2, db_ln2, db_fc, db_mlp_proj]
    return dx, [as_new_tensor(buffer) for buffer, _ in buffers] + accumulate_grads(w.vectors, vectors)


class BlockFunction(torch.autograd.Function):
    """`forward` and `backward` for autograd. The parameters are arguments only so that its graph contains them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: BlockWeights, kernels: Kernels, B: int, *parameters: Tensor) -> Tensor:
        out, activations = forward(x, w, kernels, B)
        ctx.w, ctx.kernels, ctx.B = w, kernels, B
        ctx.save_for_backward(x)
        ctx.activations = None if kernels.recompute == "block" else activations
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        activations, ctx.activations = ctx.activations, None  # frees each activation after its last use
        if activations is None:
            _, activations = forward(x, ctx.w, ctx.kernels, ctx.B)
        dx, gradients = backward(dout.contiguous(), x, activations, ctx.w, ctx.kernels)
        return (dx, None, None, None, *gradients)
