"""Validation loss, pinned: the mean over the first so many tokens of the validation shard, whatever the batch, the
number of processes or the training configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.evaluate.scoring import OnTokens, TokenLosses, autocast, token_losses
from gpt2.model.gpt import GPT, IGNORE
from gpt2.shards import open_shard


class ValLoss(NamedTuple):
    loss: float
    """nats a token"""
    tokens: int
    """predicted; fewer than asked when the shards hold fewer"""


def read_tokens(shards: Sequence[Path], tokens: int) -> NDArray[np.uint16]:
    """The first `tokens` + 1 tokens of the validation shards one after the other, or all there are.

    The last one is only predicted, never an input, as in llm.c.

    Raises:
        UserError: there are not two tokens to be had, or a shard is damaged.
    """
    parts: list[NDArray[np.uint16]] = []
    missing = tokens + 1
    for path in shards:
        parts.append(np.asarray(open_shard(path)[:missing]))
        missing -= len(parts[-1])
        if not missing:
            break
    stream = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    if len(stream) < 2:
        raise UserError(
            f"the validation shards {[str(path) for path in shards]} hold {len(stream)} tokens, 2 or more are needed: "
            "raise tokenize.val_tokens"
        )
    return stream


def val_loss(
    model: GPT,
    shards: Sequence[Path],
    tokens: int,
    micro_batch_size: int,
    world: World,
    precision: str = "fp32",
    losses_of: TokenLosses | None = None,
    on_tokens: OnTokens | None = None,
) -> ValLoss:
    """Mean cross-entropy over the first `tokens` tokens of the validation shards, in windows that do not overlap.

    Window i has the inputs [i * T, (i + 1) * T) with T = block_size, and each position predicts the token after it.
    Batches of `micro_batch_size` windows are dealt out whole to the processes and every window's sum (fp32 losses
    added in float64) is kept apart until the end, so the result does not depend on the number of processes.

    Every process must call it, and each gets the same result. The model's mode is put back as it was.

    Args:
        tokens: 10,485,760 in every recipe here.
        precision: "fp32", or "bf16" for matrix products in bfloat16.
        losses_of: a faster stand-in for `scoring.token_losses`, over the same parameters; it only ever sees
            (micro_batch_size, block_size).

    Raises:
        UserError: the shards hold fewer than two tokens.
    """
    stream = torch.from_numpy(read_tokens(shards, tokens).astype(np.int64))
    T = model.config.block_size
    used = len(stream) - 1
    windows = -(-used // T)
    sums = torch.zeros(windows, dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    losses_of = losses_of or partial(token_losses, model)
    for first in range(world.rank * micro_batch_size, windows, world.size * micro_batch_size):
        # one shape for every batch: what is past the end has no targets, and no token sees what is to its right
        idx = torch.zeros(micro_batch_size * T, dtype=torch.int64)
        targets = torch.full((micro_batch_size * T,), IGNORE, dtype=torch.int64)
        there = min(micro_batch_size * T, used - first * T)
        idx[:there] = stream[first * T : first * T + there]
        targets[:there] = stream[first * T + 1 : first * T + there + 1]
        with autocast(world.device, precision):
            # (micro_batch_size, T)
            losses = losses_of(idx.view(-1, T).to(world.device), targets.view(-1, T).to(world.device))
        mine = slice(first, min(first + micro_batch_size, windows))
        sums[mine] = losses.double().sum(dim=1)[: mine.stop - mine.start]
        if on_tokens is not None:
            on_tokens(there)
    model.train(was_training)
    return ValLoss(math.fsum(world.all_reduce(sums).tolist()) / used, used)
