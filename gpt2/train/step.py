"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from gpt2.config.train import TrainConfig
from gpt2.distributed import World
from gpt2.train.anomaly import Verdict
from gpt2.train.loader import Batch
from gpt2.train.parallel import LossFn, ParallelModel


class StepResult(NamedTuple):
    loss: float
    """mean over the step's tokens on all ranks"""
    grad_norm: float
    """global L2 norm before clipping"""
    verdict: Verdict
    signal_received: bool
    """whether any rank has received SIGTERM or SIGINT"""


def train_step(
    parallel: ParallelModel,
    loss_fn: LossFn,
    micro_batches: Iterable[Batch],
    micro_steps: int,
    lr: float,
    config: TrainConfig,
    world: World,
    *,
    check_anomaly: Callable[[float, float], Verdict] = lambda loss, grad_norm: Verdict("continue"),
    signal_number: Callable[[], int] = lambda: 0,
    sync_gradients: bool = True,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, all-reduce, gradient clipping, optimizer update.

    Args:
        micro_steps: number of `micro_batches`.
        check_anomaly: called on every rank with the step's loss and gradient norm, before the update. The update is
            left out unless the verdict's action is "continue" or "warn".
        signal_number: of the signal that this rank has received, or 0.
        sync_gradients: False leaves out the gradient all-reduce, to measure its cost.
    """
    loss = torch.zeros((), device=world.device)
    for micro_step, batch in enumerate(micro_batches, start=1):
        # Weighted by its share of the step's sequences: the sum over micro-steps and ranks is the mean over the tokens,
        # so gradients are summed, never averaged.
        micro_loss = loss_fn(batch.idx, batch.targets) * (len(batch.idx) / config.sequences_per_step)
        loss += micro_loss.detach()
        parallel.backward(micro_loss, sync_gradients=sync_gradients and micro_step == micro_steps)
    grad_norm = parallel.clip_grad_norm(config.optim.grad_clip)

    # one all-reduce for all that every rank must decide alike
    signal = torch.tensor(signal_number(), dtype=torch.float64, device=world.device)
    totals = torch.stack([loss.double(), grad_norm.double() / world.size, signal])
    mean_loss, mean_norm, signals = world.all_reduce(totals).tolist()

    verdict = check_anomaly(mean_loss, mean_norm)
    if verdict.action in ("continue", "warn"):
        parallel.optimizer_step(lr)
    parallel.zero_grad()  # frees the memory before an evaluation
    return StepResult(mean_loss, mean_norm, verdict, signal_received=signals > 0)
