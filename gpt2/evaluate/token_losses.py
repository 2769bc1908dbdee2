"""Per-token cross-entropy of a model: the one scoring function of validation loss and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.model.gpt import GPT, IGNORE

TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""idx (B, T), targets (B, T) -> losses (B, T), as `token_losses` with its model"""

OnTokens = Callable[[int], None]
"""progress callback: called after each batch with the number of tokens that this process evaluated"""

CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}
"""positions per chunk of logits; on a CPU 256 x 50,304 x 4 bytes = 51 MB"""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Context of a forward pass: "bf16" computes matrix products in bfloat16, "fp32" changes nothing.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision {precision!r} is neither bf16 nor fp32")
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def head_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy of each position under the tied head, with the logits of one chunk of positions at a time.

    Args:
        hidden: (N, C).
        weight: (V, C) with V >= vocab_size; rows from vocab_size on are padding and are ignored.
        targets: (N,) int64; -1 is ignored.

    Returns:
        (N,) fp32, -log softmax(logits)[target] in nats; 0 where the target is -1.
    """
    parts = [
        F.cross_entropy(logits, targets[part], ignore_index=IGNORE, reduction="none")  # (n,)
        for part, logits in _chunks(hidden, weight, vocab_size)
    ]
    return torch.cat(parts)


def head_greedy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Whether each target is the argmax of the logits: (N,) bool; arguments as of `head_losses`."""
    return torch.cat([logits.argmax(dim=1) == targets[part] for part, logits in _chunks(hidden, weight, vocab_size)])


def _chunks(hidden: Tensor, weight: Tensor, vocab_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the N positions with their logits (n, vocab_size) in fp32."""
    step = CHUNK_TOKENS.get(hidden.device.type, 1024)
    for start in range(0, max(len(hidden), 1), step):
        part = slice(start, start + step)
        yield part, F.linear(hidden[part], weight)[:, :vocab_size].float()


@torch.no_grad()
def token_losses(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """Losses (B, T) fp32, in nats, of the tokens `targets` (B, T) that follow each position of `idx` (B, T).

    Args:
        targets: -1 is ignored and gives 0.
    """
    states = model.hidden(idx)  # (B, T, C)
    losses = head_losses(states.flatten(0, 1), model.transformer.wte.weight, targets.flatten(), model.config.vocab_size)
    return losses.view_as(targets)


@torch.no_grad()
def losses_at(
    model: GPT, hidden: Tensor, positions: Tensor, targets: Tensor, *, greedy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `token_losses`, at some positions only; the head is not computed for the others.

    Args:
        hidden: (B, T, C) states after the last LayerNorm.
        positions: (N,) indices into the flattened (B * T,) positions.
        targets: (N,) the token that follows each.

    Returns:
        losses (N,) fp32 in nats, and with `greedy` whether each target is the argmax of the logits (N,) bool.
    """
    states = hidden.flatten(0, 1)[positions]  # (N, C)
    head = (model.transformer.wte.weight, targets, model.config.vocab_size)
    return head_losses(states, *head), head_greedy(states, *head) if greedy else None
