"""Builds the model of a training run, its loss function and its initial weights."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from gpt2.config.runtime import Runtime
from gpt2.config.train import TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.kernels.fused_gpt import FusedGPT, accelerate
from gpt2.kernels.head import Fp8Head
from gpt2.model.checkpoint import Snapshot, TrainState
from gpt2.model.gpt import GPT
from gpt2.train.parallel import MOMENTS, DataParallel, LossFn, ParallelModel


def build_model(config: TrainConfig, runtime: Runtime, world: World) -> tuple[ParallelModel, LossFn]:
    """The model in the layout of `runtime`, its weights not initialized, and the function that computes its loss.

    Raises:
        UserError: with fsdp, the number of ranks does not divide the sequences of a step.
    """
    with torch.device("meta"):
        model = GPT(config.model)
    model.checkpoint_blocks = runtime.activation_checkpointing is True
    parallel: ParallelModel
    if runtime.sharding == "fsdp":
        parallel, loss_fn = _build_fsdp(model, config, runtime, world)
    else:
        model.to_empty(device=world.device)
        parallel = DataParallel(model, config.optim, world, zero1=runtime.sharding == "zero1")
        loss_fn = accelerate(model, runtime, world.device, fp8_head=config.fp8_head)
    if config.fp8_head and not isinstance(loss_fn, FusedGPT):
        print("warning: train.fp8_head has no effect: only the fused kernels have an FP8 head", file=sys.stderr)
    return parallel, loss_fn


def has_fp8_head(loss_fn: LossFn) -> bool:
    """Whether the output head multiplies in FP8: it is configured, and the GPU supports it."""
    return isinstance(loss_fn, FusedGPT) and isinstance(loss_fn.head, Fp8Head)


def _build_fsdp(model: GPT, config: TrainConfig, runtime: Runtime, world: World) -> tuple[ParallelModel, LossFn]:
    if config.sequences_per_step % world.size:
        raise UserError(
            f"runtime.sharding=fsdp needs the same number of sequences on every process: {config.sequences_per_step} "
            f"sequences per step are not divisible by {world.size}; change the number of processes, or set "
            f"runtime.sharding=zero1"
        )
    if runtime.compile:
        for block in model.blocks:
            block.compile()
    from gpt2.train.fsdp import FullyShardedDataParallel  # slow to import

    parallel = FullyShardedDataParallel(model, config.optim, world, bf16=runtime.precision == "bf16")

    def loss_fn(idx: Tensor, targets: Tensor) -> Tensor:
        loss = model(idx, targets)[1]
        assert loss is not None
        return loss

    return parallel, loss_fn


def initial_snapshot(config: TrainConfig) -> Snapshot:
    """Step 0: random initial weights, or those of `init_from`; optimizer state zero.

    Raises:
        UserError: init_from holds weights of another architecture, or others than planned.
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
    """The driver's name of this rank's GPU, or "cpu"."""
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
