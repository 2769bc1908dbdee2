"""The loss on a CPU in chunks, so that the logits of a whole micro-batch never exist.

Logits are the largest tensor of a small model: 412 MB for 2,048 positions, and the reference path allocates several.
Here one buffer holds a chunk at a time, and the forward pass also computes the chunk's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2.model.gpt import GPT, IGNORE

CHUNK = 128
"""positions per chunk: 26 MB of logits, which the allocator reuses"""


class _LinearCrossEntropy(torch.autograd.Function):
    """The tied head and the mean cross-entropy, with gradients for both factors."""

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
            logits, index = padded[:, :vocab_size], target.clamp_min(0)[:, None]
            logits -= logits.amax(dim=1, keepdim=True)
            target_logit = logits.gather(1, index)
            total = logits.exp_().sum(dim=1, keepdim=True)
            losses.append(torch.where(target == IGNORE, 0.0, (total.log() - target_logit)[:, 0]))
            if any(ctx.needs_input_grad):  # (softmax - one-hot) / scored
                weight_per_row = (target != IGNORE)[:, None].to(x.dtype) / scored
                logits *= weight_per_row / total
                logits.scatter_add_(1, index, -weight_per_row)
                padded[:, vocab_size:] = 0
                torch.mm(padded, weight, out=dx[part])
                dweight.addmm_(padded.t(), hidden)
        ctx.save_for_backward(dx, dweight)
        return torch.cat(losses).sum() / scored

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return dx.mul_(dloss), dweight.mul_(dloss), None, None


class ChunkedLossGPT(nn.Module):
    """(idx (B, T), targets (B, T)) -> mean loss in nats over the targets that are not -1, on `model`'s parameters;
    equals `model`'s loss up to rounding."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.model.hidden(idx).flatten(0, 1)  # (B T, C)
        return _LinearCrossEntropy.apply(
            x, self.model.transformer.wte.weight, targets.flatten(), self.model.config.vocab_size
        )
