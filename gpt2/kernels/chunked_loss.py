"""The loss on a CPU, without ever holding the logits of a whole micro-batch.

GPT-2's vocabulary makes a small model's logits its largest tensor by far: 2,048 positions are 412 MB, and the plain
path makes several such, each in memory that the system first has to find. Here a piece of them at a time is made in
one buffer, and the gradient is taken in the forward pass, while the piece is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2.model.gpt import GPT, IGNORE

CHUNK = 128
"""positions at a time: 26 MB of logits, which the allocator keeps between uses"""


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy under the tied head, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        scored = (targets != IGNORE).sum().clamp_min(1)
        buffer = x.new_empty(min(CHUNK, len(x)), len(weight))
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        losses = []
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            hidden, target = x[part], targets[part]
            padded = torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])  # (n, V padded)
            logits, at = padded[:, :vocab_size], target.clamp_min(0)[:, None]
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, at)
            total = logits.exp_().sum(dim=1, keepdim=True)
            losses.append(torch.where(target == IGNORE, 0.0, (total.log() - chosen)[:, 0]))
            if any(ctx.needs_input_grad):  # softmax - one-hot, of the scored positions' mean
                share = (target != IGNORE)[:, None].to(x.dtype) / scored
                logits *= share / total
                logits.scatter_add_(1, at, -share)
                padded[:, vocab_size:] = 0
                torch.mm(padded, weight, out=dx[part])
                dweight.addmm_(padded.t(), hidden)
        ctx.save_for_backward(dx, dweight)
        return torch.cat(losses).sum() / scored

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return dx.mul_(dloss), dweight.mul_(dloss), None, None


class ChunkedLoss(nn.Module):
    """(idx (B, T), targets (B, T)) -> mean loss in nats over the targets that are not -1, as `GPT` gives it up to
    rounding, over the parameters of `model`."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.model.hidden(idx).flatten(0, 1)  # (B T, C)
        return _HeadLoss.apply(x, self.model.transformer.wte.weight, targets.flatten(), self.model.config.vocab_size)
