"""How well a model predicts given tokens: the one scoring function of validation loss and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.model.gpt import GPT, IGNORE

TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""idx (B, T), targets (B, T) -> losses (B, T), as `token_losses` gives them"""

OnTokens = Callable[[int], None]
"""told, after each batch, how many tokens this process is done with; what sequences share counts for each"""

CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}
"""positions whose logits exist at a time: 256 x 50,304 x 4 bytes are 51 MB, what a CPU's caches and memory like"""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context to score in: "bf16" computes matrix products in bfloat16, "fp32" leaves everything as it is.

    Raises:
        ValueError: neither of the two.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision {precision!r} is neither bf16 nor fp32")
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def head_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy of each position under the tied head, with logits for only a chunk of positions at a time.

    Args:
        hidden: (N, C).
        weight: (V or more, C); rows from vocab_size on are padding and take no part.
        targets: (N,) int64, or -1 where nothing is to be predicted.

    Returns:
        (N,) fp32, -log softmax(logits)[target] in nats; 0 where the target is -1.
    """
    parts = [
        F.cross_entropy(logits, targets[part], ignore_index=IGNORE, reduction="none")  # (n,)
        for part, logits in _chunks(hidden, weight, vocab_size)
    ]
    return torch.cat(parts)


def head_greedy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Whether each target is the likeliest token: (N,) bool; arguments as of `head_losses`."""
    return torch.cat([logits.argmax(dim=1) == targets[part] for part, logits in _chunks(hidden, weight, vocab_size)])


def _chunks(hidden: Tensor, weight: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """(part of the N positions, its logits (n, vocab_size) fp32)"""
    step = CHUNK_TOKENS.get(hidden.device.type, 1024)
    for start in range(0, max(len(hidden), 1), step):
        part = slice(start, start + step)
        yield part, F.linear(hidden[part], weight)[:, :vocab_size].float()


@torch.no_grad()
def token_losses(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """Losses (B, T) fp32, in nats, of the tokens `targets` (B, T) that follow each position of `idx` (B, T).

    Args:
        targets: -1 where nothing is to be predicted, which gives 0.
    """
    states = model.hidden(idx)  # (B, T, C)
    losses = head_losses(states.flatten(0, 1), model.transformer.wte.weight, targets.flatten(), model.config.vocab_size)
    return losses.view_as(targets)


@torch.no_grad()
def chosen_losses(
    model: GPT, hidden: Tensor, positions: Tensor, targets: Tensor, *, greedy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `token_losses`, but at some positions only: the head, which is most of a small model, is spared the rest.

    Args:
        hidden: (B, T, C) states after the last LayerNorm.
        positions: (N,) indices into the flattened (B * T,) positions.
        targets: (N,) the token that follows each.

    Returns:
        losses (N,) fp32 in nats, and with `greedy` whether each target is the likeliest token (N,) bool.
    """
    states = hidden.flatten(0, 1)[positions]  # (N, C)
    head = (model.transformer.wte.weight, targets, model.config.vocab_size)
    return head_losses(states, *head), head_greedy(states, *head) if greedy else None
