"""Validation loss: mean cross-entropy over a fixed number of tokens, independent of batch size and processes."""

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
from gpt2.evaluate.token_losses import OnTokens, TokenLosses, autocast, token_losses
from gpt2.model.gpt import GPT, IGNORE
from gpt2.shards import open_shard


class ValLoss(NamedTuple):
    loss: float
    """nats per token"""
    tokens: int
    """predicted tokens; fewer than requested if the shards hold fewer"""


def read_tokens(shards: Sequence[Path], tokens: int) -> NDArray[np.uint16]:
    """The first `tokens` + 1 tokens of the concatenated shards, or all of them; the last one is only predicted (llm.c).

    Raises:
        UserError: the shards hold fewer than two tokens, or one is damaged.
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
            f"the validation shards {[str(path) for path in shards]} hold {len(stream)} tokens, at least 2 are needed: "
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
    """Mean cross-entropy over the first `tokens` tokens of the validation shards, in windows without overlap.

    Window i has the inputs [i * T, (i + 1) * T) with T = block_size, and each position predicts the next token. Each
    window's fp32 losses are summed in float64 by one process, and the sums are added last with fsum, so the result does
    not depend on the number of processes.

    A collective call with the same result on every process. Restores the mode (train or eval) of the model.

    Args:
        tokens: 10,485,760 in every recipe of conf/.
        precision: "fp32", or "bf16" for matrix products in bfloat16.
        losses_of: replaces `token_losses` of `model`; always called with (micro_batch_size, block_size) tokens.

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
        # all batches have one shape; positions past the end have no targets, and attention is causal
        idx = torch.zeros(micro_batch_size * T, dtype=torch.int64)
        targets = torch.full((micro_batch_size * T,), IGNORE, dtype=torch.int64)
        valid = min(micro_batch_size * T, used - first * T)
        idx[:valid] = stream[first * T : first * T + valid]
        targets[:valid] = stream[first * T + 1 : first * T + valid + 1]
        with autocast(world.device, precision):
            # (micro_batch_size, T)
            losses = losses_of(idx.view(-1, T).to(world.device), targets.view(-1, T).to(world.device))
        window = slice(first, min(first + micro_batch_size, windows))
        sums[window] = losses.double().sum(dim=1)[: window.stop - window.start]
        if on_tokens is not None:
            on_tokens(valid)
    model.train(was_training)
    return ValLoss(math.fsum(world.all_reduce(sums).tolist()) / used, used)
