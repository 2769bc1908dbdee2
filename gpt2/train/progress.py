"""Where a training run stands."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2.config.train import TrainConfig
from gpt2.model.checkpoint import TrainState
from gpt2.stage.facts import Session


@dataclass
class Progress:
    """The mutable part of TrainState, which defines the fields; `skipped_batches` is its `passed_over`."""

    step: int
    evaluated: bool
    skipped_batches: int
    skips: int
    val_loss: float | None
    speeds: tuple[float, ...]
    mfus: tuple[float, ...]
    train_seconds: float
    sessions: tuple[Session, ...]
    """without the current one"""

    @classmethod
    def from_state(cls, state: TrainState) -> Progress:
        return cls(
            state.step, state.evaluated, state.passed_over, state.skips, state.val_loss, state.speeds, state.mfus,
            state.train_seconds, state.sessions,
        )  # fmt: skip


def is_due(config: TrainConfig, step: int, every: int) -> bool:
    """Whether periodic work is due after `step` optimizer steps."""
    return step % every == 0 or step == config.max_steps


def evaluation_due(config: TrainConfig, step: int) -> bool:
    """Whether validation, the benchmark or samples are due after `step` optimizer steps."""
    return any(is_due(config, step, every) for every in (config.val.every, config.benchmark_every, config.sample.every))
