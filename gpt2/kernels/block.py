"""One transformer block by hand: a forward pass that keeps what the backward pass reads, and that backward pass.

The gradients of the parameters are added straight into their `.grad` by the matrix products, in fp32. Autograd is
handed the finished sums as if they were this pass's gradients (see `take`), so hooks, DDP's among them, see them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2.kernels import gelu, layer_norm
from gpt2.kernels.attention import Attention
from gpt2.kernels.linear import Linear
from gpt2.kernels.row_sum import row_sum
from gpt2.model.gpt import LAYER_NORM_EPS, Block

Recompute = Literal["none", "cheap", "block"]
"""What is computed again in the backward pass instead of kept: nothing; the outputs of LayerNorm and GELU; the block"""

UNITS_KEPT = {"none": 16, "cheap": 10, "block": 1}
"""activations kept in a block, in units of B * T * C elements"""


@dataclass
class Engine:
    """What all blocks of a model share."""

    linear: Linear
    attention: Attention
    recompute: Recompute = "none"
    passing: tuple[Tensor, Tensor] | None = None
    """in a backward pass: the gradient (N, C) handed from one block to the one before, and its sum over the rows"""

    def row_sum_of(self, dout: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of dout over its rows: the one that came with it, if dout is what the last backward pass returned."""
        passing, self.passing = self.passing, None
        if passing is not None and passing[0].data_ptr() == dout.data_ptr():
            return passing[1]
        return row_sum(dout, dtype)


class Weights:
    """A block's parameters, and the copies of the matrices and of the biases beside them that the products read."""

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


def take(parameter: Tensor) -> tuple[Tensor, bool]:
    """The buffer to put a parameter's gradient into, and whether it already holds a sum to add to.

    `.grad` is taken out of the parameter: handed to autograd by `give`, it is put back without adding or copying.
    """
    grad, parameter.grad = parameter.grad, None
    return (torch.empty_like(parameter), False) if grad is None else (grad, True)


def give(total: Tensor) -> Tensor:
    """The same memory as a new tensor, to be returned from a backward pass. A tensor that somebody else refers to, as
    those who keep all gradients in one flat buffer do, autograd would copy, and the buffer would be left behind."""
    return total.view_as(total)


def add_to(parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The parameters' gradients so far, if there are any, plus these new ones; `.grad` is taken as in `take`."""
    totals = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(totals) == len(gradients):
        torch._foreach_add_(tuple(totals), tuple(gradients))
    else:
        totals = [
            new if parameter.grad is None else parameter.grad + new
            for parameter, new in zip(parameters, gradients, strict=True)
        ]
    for parameter in parameters:
        parameter.grad = None
    return [give(total) for total in totals]


def forward(x: Tensor, w: Weights, engine: Engine, B: int) -> tuple[Tensor, tuple[Any, ...]]:
    """The block's output (B * T, C) for its input x (B * T, C), and what `backward` needs beside x."""
    N = x.size(0)
    h1, mean1, rstd1 = layer_norm.forward(x, w.ln_1.weight, w.ln_1.bias, LAYER_NORM_EPS)
    qkv = engine.linear.forward(h1, *w.c_attn).view(B, N // B, -1)  # (B, T, 3 C)
    y, attention = engine.attention.forward(qkv)  # (B, T, C)
    x2 = engine.linear.forward(y.view(N, -1), *w.attn_proj, residual=x)  # (N, C)
    h2, mean2, rstd2 = layer_norm.forward(x2, w.ln_2.weight, w.ln_2.bias, LAYER_NORM_EPS)
    u, a = engine.linear.forward_gelu(h2, *w.c_fc)  # (N, 4 C) before and after GELU
    out = engine.linear.forward(a, *w.mlp_proj, residual=x2)  # (N, C)
    again = engine.recompute != "none"
    kept = (None, None, None) if again else (h1, h2, a)
    return out, (*kept, qkv, y, attention, x2, u, mean1, rstd1, mean2, rstd2)


def backward(dout: Tensor, x: Tensor, kept: tuple[Any, ...], w: Weights, engine: Engine) -> tuple[Tensor, list[Tensor]]:
    """From the gradient of the output (N, C): that of x, and the sums for w.matrices and then w.vectors."""
    h1, h2, a, qkv, y, attention, x2, u, mean1, rstd1, mean2, rstd2 = kept
    linear, N = engine.linear, x.size(0)
    buffers = [take(matrix) for matrix in w.matrices]
    d_attn, d_attn_proj, d_fc, d_mlp_proj = buffers
    if a is None:
        a = gelu.forward(u)
    total = w.ln_1.weight.dtype
    db_mlp_proj = engine.row_sum_of(dout, total)
    linear.weight_grad_(*d_mlp_proj, dout, a)
    du = linear.input_grad_gelu(dout, w.mlp_proj[0], u)  # (N, 4 C)
    del a, u
    if h2 is None:
        h2, _, _ = layer_norm.forward(x2, w.ln_2.weight, w.ln_2.bias, LAYER_NORM_EPS)
    db_fc = row_sum(du, total)
    linear.weight_grad_(*d_fc, du, h2)
    dh2 = linear.input_grad(du, w.c_fc[0])  # (N, C)
    del du, h2
    dx2, dw_ln2, db_ln2, db_attn_proj = layer_norm.backward(dh2, dout, x2, mean2, rstd2, w.ln_2.weight)
    linear.weight_grad_(*d_attn_proj, dx2, y.view(N, -1))
    dy = linear.input_grad(dx2, w.attn_proj[0]).view_as(y)
    dqkv = engine.attention.backward(dy, qkv, y, attention).view(N, -1)  # (N, 3 C)
    if h1 is None:
        h1, _, _ = layer_norm.forward(x, w.ln_1.weight, w.ln_1.bias, LAYER_NORM_EPS)
    db_attn = row_sum(dqkv, total)
    linear.weight_grad_(*d_attn, dqkv, h1)
    dh1 = linear.input_grad(dqkv, w.c_attn[0])  # (N, C)
    dx, dw_ln1, db_ln1, dx_sum = layer_norm.backward(dh1, dx2, x, mean1, rstd1, w.ln_1.weight)
    engine.passing = dx, dx_sum
    vectors = [dw_ln1, db_ln1, db_attn, db_attn_proj, dw_ln2, db_ln2, db_fc, db_mlp_proj]
    return dx, [give(buffer) for buffer, _ in buffers] + add_to(w.vectors, vectors)


class BlockFunction(torch.autograd.Function):
    """`forward` and `backward` as autograd knows them; the parameters are passed for its graph, not to be read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Weights, engine: Engine, B: int, *parameters: Tensor) -> Tensor:
        out, kept = forward(x, w, engine, B)
        ctx.w, ctx.engine, ctx.B = w, engine, B
        ctx.save_for_backward(x)
        ctx.kept = None if engine.recompute == "block" else kept
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # freed as it is used
        if kept is None:
            _, kept = forward(x, ctx.w, ctx.engine, ctx.B)
        dx, gradients = backward(dout.contiguous(), x, kept, ctx.w, ctx.engine)
        return (dx, None, None, None, *gradients)
