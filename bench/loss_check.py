"""The loss of the fast path beside that of the plain one, from the same weights over the same tokens.

Also the step that the benchmark times: `Loop`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig, TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.shards import open_shard
from gpt2.train.build import build, fresh
from gpt2.train.loader import places
from gpt2.train.memory import choose, free_bytes, settle_micro_batch
from gpt2.train.optim import learning_rate

Batch = tuple[Tensor, Tensor]


def zipf_tokens(config: ModelConfig, sequences: int, device: torch.device, seed: int = 0) -> Batch:
    """Random (idx, targets), each (sequences, block_size), with the r-th commonest token as likely as 1 / r."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = 1.0 / torch.arange(1, config.vocab_size + 1, device=device)
    shape = (sequences, config.block_size + 1)
    tokens = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator).view(shape)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Loop:
    """The training stage's step, over one set of weights, by one process of `world`; several share each batch.

    Args:
        runtime: how, micro-batch included; what it leaves open is settled as in training.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, world: World) -> None:
        self.config, self.world = config, world
        self.runtime, _ = choose(config, runtime, world, free_bytes(world))
        self.parallel, self.loss = build(config, self.runtime, world)
        self.runtime = settle_micro_batch(config, self.runtime, runtime, world, self.parallel, self.loss)
        self.parallel.restore(fresh(config).tensors if world.is_main else {})

    def step(self, step: int, batch: Batch, *, summed: bool = True) -> float:
        """One optimizer step over a whole batch (sequences, T); its mean loss.

        Args:
            summed: False leaves out the sum of the gradients over the processes, to see what time it takes.
        """
        world, sequences = self.world, len(batch[0])
        micro = self.runtime.micro_batch_size
        assert isinstance(micro, int)
        parts = places(sequences, world.size, micro, world.rank)
        total = torch.zeros((), device=world.device)
        for i, part in enumerate(parts, start=1):
            idx, targets = (tokens[part] for tokens in batch)
            share = self.loss(idx, targets) * (len(idx) / sequences)
            self.parallel.backward(share, last=summed and i == len(parts))
            total += share.detach()
        norm = self.parallel.clip(self.config.optim.grad_clip)
        told = world.all_reduce(torch.stack([total.double(), norm.double()])).tolist()  # as in training, before weights
        self.parallel.step(learning_rate(self.config.optim, self.config.max_steps, step))
        self.parallel.clear()
        return float(told[0])


def real_batches(path: Path, config: ModelConfig, sequences: int, device: torch.device) -> Iterator[Batch]:
    """Batches (sequences, T) in file order out of a token shard, from the start again when it ends."""
    tokens = torch.from_numpy(open_shard(path).astype("int64"))
    span = sequences * config.block_size
    if len(tokens) <= span:
        raise UserError(f"{path} holds {len(tokens):,} tokens, one batch takes {span + 1:,}: give a longer shard")
    while True:
        for start in range(0, len(tokens) - span, span):
            part = tokens[start : start + span + 1].to(device)
            yield part[:-1].view(sequences, -1), part[1:].view(sequences, -1)


def losses_of(config: TrainConfig, runtime: Runtime, world: World, path: Path, micro: int, steps: int) -> list[float]:
    """The losses of the first `steps` steps of a run of `config` over the tokens of `path`."""
    loop = Loop(config, runtime.model_copy(update={"micro_batch_size": micro}), world)
    batches = real_batches(path, config.model, config.sequences_per_step, world.device)
    return [loop.step(step, next(batches)) for step in range(steps)]


def check(
    config: TrainConfig, runtime: Runtime, world: World, path: Path, micro: int, steps: int, floor: bool = False
) -> dict[str, float]:
    """Train on the plain path and on `runtime`'s, from the same weights over the same tokens, and compare.

    Args:
        floor: also compare the plain path with itself at half the micro-batch, where nothing but rounding differs: what
            of a difference is to be expected from nothing.

    Returns:
        differences over the steps, in nats: mean, means of the quarters, mean and largest without sign.
    """
    plain_runtime = runtime.model_copy(update={"kernels": "reference", "compile": False})
    plain_config = config.model_copy(update={"fp8_head": False})
    plain = losses_of(plain_config, plain_runtime, world, path, micro, steps)
    fast = losses_of(config, runtime, world, path, micro, steps)
    figures = {"first plain loss": plain[0], "last plain loss": plain[-1], "last fast loss": fast[-1]}
    figures |= difference(plain, fast, "")
    if floor:
        halved = losses_of(plain_config, plain_runtime, world, path, max(1, micro // 2), steps)
        figures |= difference(plain, halved, "plain against itself: ")
    return figures


def difference(plain: list[float], other: list[float], label: str) -> dict[str, float]:
    signed = [b - a for a, b in zip(plain, other, strict=True)]
    cuts = [len(signed) * i // 4 for i in range(5)]
    quarters = {f"{label}mean of quarter {i}": signed[cuts[i - 1] : cuts[i]] for i in range(1, 5)}
    return {
        f"{label}mean difference": statistics.fmean(signed),
        **{name: statistics.fmean(part) for name, part in quarters.items() if part},
        f"{label}mean without sign": statistics.fmean(map(abs, signed)),
        f"{label}largest": max(map(abs, signed)),
    }
