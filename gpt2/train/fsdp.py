"""Weights, gradients and moments cut up over the processes (FSDP2), for models that do not fit any other way.

Apart from gpt2.train.data_parallel because what it imports takes as long to load as the rest of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from gpt2.config.train import OptimConfig
from gpt2.distributed import World
from gpt2.model.gpt import GPT
from gpt2.train.data_parallel import MOMENTS, from_main
from gpt2.train.optim import build_optimizer, set_learning_rate


class Shards:
    """FSDP2: weights are gathered block by block when they are needed, in bf16 where that is the precision."""

    def __init__(self, model: GPT, config: OptimConfig, world: World, *, bf16: bool) -> None:
        self.model, self.world = model, world
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "hidden")
        model.to_empty(device=world.device)  # it comes without memory, so that no process ever holds all of it
        self.parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.names = dict(model.named_parameters())
        self.optimizer = build_optimizer(self.names.values(), config)

    def backward(self, loss: Tensor, last: bool) -> None:
        # FSDP averages over the processes. It reduces after every micro-step: whole gradients are what does not fit.
        (loss * self.world.size).backward()

    def clip(self, max_norm: float | None) -> Tensor:
        gradients = [p.grad for p in self.names.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.names.values()), max_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self) -> Iterator[GPT]:
        for part in self.parts:
            part.set_reshard_after_forward(False)
            part.unshard()
        try:
            yield self.model
        finally:
            for part in self.parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.model)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.names.items():
            yield name, _full(parameter.detach())
        for name, parameter in self.names.items():
            for key in MOMENTS:
                yield f"{name}/{key}", _full(self.optimizer.state[parameter][key])

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.names.items():
            _scatter(parameter, from_main(tensors, name, parameter.shape, self.world))
            for key in MOMENTS:
                state = self.optimizer.state[parameter][key]
                _scatter(state, from_main(tensors, f"{name}/{key}", state.shape, self.world))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _scatter(target: Tensor, full: Tensor) -> None:
    """Copy this process's part of a tensor that every process holds."""
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(full)
