"""Compares the loss curve of the fused kernels with the reference path's, from the same weights over the same tokens.

`TrainRun` is also what bench.train times.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig, TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.shards import open_shard
from gpt2.train.build import build_model, initial_snapshot
from gpt2.train.loader import Batch, micro_batch_slices
from gpt2.train.memory import free_bytes, resolve_runtime, tune_micro_batch
from gpt2.train.optim import learning_rate
from gpt2.train.step import train_step


def zipf_tokens(config: ModelConfig, sequences: int, device: torch.device, seed: int = 0) -> Batch:
    """Random batch (sequences, block_size); the r-th most frequent token has a probability proportional to 1 / r."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = 1.0 / torch.arange(1, config.vocab_size + 1, device=device)
    shape = (sequences, config.block_size + 1)
    tokens = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator).view(shape)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class TrainRun:
    """A training run over batches in memory, on one rank of `world`; the ranks share each batch.

    Args:
        runtime: "auto" values are resolved as in the train stage.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, world: World) -> None:
        self.config, self.world = config, world
        self.runtime, _ = resolve_runtime(config, runtime, world, free_bytes(world))
        self.parallel, self.loss_fn = build_model(config, self.runtime, world)
        self.runtime = tune_micro_batch(config, self.runtime, runtime, world, self.parallel, self.loss_fn)
        self.parallel.load_state_tensors(initial_snapshot(config).tensors if world.is_main else {})
        assert self.runtime.micro_batch_size != "auto"
        self.slices = micro_batch_slices(
            config.sequences_per_step, world.size, self.runtime.micro_batch_size, world.rank
        )

    def step(self, step: int, batch: Batch, *, sync_gradients: bool = True) -> float:
        """One `train_step` over a batch (sequences_per_step, T); its mean loss."""
        micro_batches = [Batch(batch.idx[positions], batch.targets[positions]) for positions in self.slices]
        lr = learning_rate(self.config.optim, self.config.max_steps, step)
        return train_step(
            self.parallel, self.loss_fn, micro_batches, len(micro_batches), lr, self.config, self.world,
            sync_gradients=sync_gradients,
        ).loss  # fmt: skip


def real_batches(path: Path, config: ModelConfig, sequences: int, device: torch.device) -> Iterator[Batch]:
    """Batches (sequences, T) of a token shard in file order; starts over at its end."""
    tokens = torch.from_numpy(open_shard(path).astype("int64"))
    span = sequences * config.block_size
    if len(tokens) <= span:
        raise UserError(f"{path} holds {len(tokens):,} tokens, one batch needs {span + 1:,}: use a longer shard")
    while True:
        for start in range(0, len(tokens) - span, span):
            part = tokens[start : start + span + 1].to(device)
            yield Batch(part[:-1].view(sequences, -1), part[1:].view(sequences, -1))


def losses_of(config: TrainConfig, runtime: Runtime, world: World, path: Path, micro: int, steps: int) -> list[float]:
    """Losses of the first `steps` steps over the tokens of the shard `path`."""
    train_run = TrainRun(config, runtime.model_copy(update={"micro_batch_size": micro}), world)
    batches = real_batches(path, config.model, config.sequences_per_step, world.device)
    return [train_run.step(step, next(batches)) for step in range(steps)]


def check(
    config: TrainConfig, runtime: Runtime, world: World, path: Path, micro: int, steps: int, floor: bool = False
) -> dict[str, float]:
    """Train with the reference path and with `runtime`, from the same weights over the same tokens, and compare.

    Args:
        floor: also compare the reference path with itself at half the micro-batch: the difference due to rounding.

    Returns:
        Loss differences in nats over the steps: mean, means of the quarters, mean and largest absolute difference.
    """
    reference_runtime = runtime.model_copy(update={"kernels": "reference", "compile": False})
    reference_config = config.model_copy(update={"fp8_head": False})
    reference = losses_of(reference_config, reference_runtime, world, path, micro, steps)
    fused = losses_of(config, runtime, world, path, micro, steps)
    figures = {"first reference loss": reference[0], "last reference loss": reference[-1], "last fused loss": fused[-1]}
    figures |= difference(reference, fused, "")
    if floor:
        halved = losses_of(reference_config, reference_runtime, world, path, max(1, micro // 2), steps)
        figures |= difference(reference, halved, "reference against itself: ")
    return figures


def difference(reference: list[float], other: list[float], label: str) -> dict[str, float]:
    signed = [b - a for a, b in zip(reference, other, strict=True)]
    cuts = [len(signed) * i // 4 for i in range(5)]
    quarters = {f"{label}mean of quarter {i}": signed[cuts[i - 1] : cuts[i]] for i in range(1, 5)}
    return {
        f"{label}mean difference": statistics.fmean(signed),
        **{name: statistics.fmean(part) for name, part in quarters.items() if part},
        f"{label}mean absolute difference": statistics.fmean(map(abs, signed)),
        f"{label}largest": max(map(abs, signed)),
    }
