"""FSDP2: weights, gradients and optimizer state are sharded over the ranks, for models that do not fit otherwise.

Not in gpt2.train.parallel because its imports take as long as the rest of the program's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from gpt2.config.train import OptimConfig
from gpt2.distributed import World
from gpt2.model.gpt import GPT
from gpt2.train.optim import build_optimizer
from gpt2.train.parallel import MOMENTS, ParallelModel, broadcast_tensor, full_tensor


class FullyShardedDataParallel(ParallelModel):
    """Gathers weights block by block when they are used; in bf16 where that is the precision."""

    def __init__(self, model: GPT, config: OptimConfig, world: World, *, bf16: bool) -> None:
        self.model, self.world = model, world
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "hidden")
        model.to_empty(device=world.device)  # from the meta device: no rank ever holds the full model
        self.modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(self.parameters.values(), config)

    def backward(self, loss: Tensor, *, sync_gradients: bool) -> None:
        # FSDP averages over the ranks. It reduces in every micro-step: unsharded gradients do not fit.
        (loss * self.world.size).backward()

    @contextmanager
    def full_parameters(self) -> Iterator[GPT]:
        for module in self.modules:
            module.set_reshard_after_forward(False)
            module.unshard()
        try:
            yield self.model
        finally:
            for module in self.modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.model)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, full_tensor(parameter.detach())
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                yield f"{name}/{key}", full_tensor(self.optimizer.state[parameter][key])

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            _copy_shard(parameter, broadcast_tensor(tensors, name, parameter.shape, self.world))
            for key in MOMENTS:
                state = self.optimizer.state[parameter][key]
                _copy_shard(state, broadcast_tensor(tensors, f"{name}/{key}", state.shape, self.world))


def _copy_shard(target: Tensor, full: Tensor) -> None:
    """Copy this rank's shard of a tensor that every rank holds in full."""
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(full)
