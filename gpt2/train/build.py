"""What a training run begins with: the model as it lies on the processes, its loss function, its first weights."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from gpt2.config.runtime import Runtime
from gpt2.config.train import TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.kernels.fused_gpt import FastGPT, accelerate
from gpt2.kernels.head import Fp8Head
from gpt2.model.checkpoint import Snapshot, TrainState
from gpt2.model.gpt import GPT
from gpt2.train.data_parallel import MOMENTS, LossFn, Parallel, Replicas


def build(config: TrainConfig, runtime: Runtime, world: World) -> tuple[Parallel, LossFn]:
    """The model laid out as `runtime` says, its weights still to be filled in, and the function that gives its loss."""
    with torch.device("meta"):
        model = GPT(config.model)
    model.checkpoint_blocks = runtime.activation_checkpointing is True
    parallel: Parallel
    if runtime.sharding == "fsdp":
        parallel, loss_fn = _sharded(model, config, runtime, world)
    else:
        model.to_empty(device=world.device)
        parallel = Replicas(model, config.optim, world, zero1=runtime.sharding == "zero1")
        loss_fn = accelerate(model, runtime, world.device, fp8_head=config.fp8_head)
    if config.fp8_head and not isinstance(loss_fn, FastGPT):
        print("train.fp8_head changes nothing here: only the fused kernels have such a head", file=sys.stderr)
    return parallel, loss_fn


def has_fp8_head(loss_fn: LossFn) -> bool:
    """Whether the head's products are made in 8 bits: asked for and to be had."""
    return isinstance(loss_fn, FastGPT) and isinstance(loss_fn.head, Fp8Head)


def _sharded(model: GPT, config: TrainConfig, runtime: Runtime, world: World) -> tuple[Parallel, LossFn]:
    if config.sequences_per_step % world.size:
        raise UserError(
            f"runtime.sharding=fsdp needs the same number of sequences on every process: {config.sequences_per_step} a "
            f"step do not divide by {world.size}; use another number of processes, or runtime.sharding=zero1"
        )
    if runtime.compile:
        for block in model.blocks:
            block.compile()
    from gpt2.train.fsdp import Shards  # slow to import

    parallel = Shards(model, config.optim, world, bf16=runtime.precision == "bf16")

    def loss_fn(idx: Tensor, targets: Tensor) -> Tensor:
        loss = model(idx, targets)[1]
        assert loss is not None
        return loss

    return parallel, loss_fn


def fresh(config: TrainConfig) -> Snapshot:
    """Step 0: the recipe's initial weights, or those of `init_from`; moments at zero.

    Raises:
        UserError: init_from holds no weights of this architecture, or not the planned ones.
    """
    model = GPT(config.model)
    if config.init_from is None:
        model.init_weights(config.seed)
    else:
        from gpt2.model.load import load_init

        load_init(model, config.init_from, config.init_sha256)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, weight in list(tensors.items()):
        for key in MOMENTS:
            tensors[f"{name}/{key}"] = torch.zeros(()) if key == "step" else torch.zeros_like(weight)
    return Snapshot(TrainState(step=0, evaluated=False), tensors)


def device_name(world: World) -> str:
    """Of one process's device, as the driver gives it, or "cpu"."""
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
