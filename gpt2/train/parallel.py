"""How weights, gradients and optimizer state are laid out over the ranks; the training loop does not depend on it.

`DataParallel`: every rank holds all weights; gradients are all-reduced. With zero1 the optimizer state is partitioned
tensor by tensor (ZeRO stage 1: Rajbhandari et al., arXiv:1910.02054). `gpt2.train.fsdp.FullyShardedDataParallel`: every
tensor is sharded.

Both read and write checkpoints as full tensors under the parameters' names, so a checkpoint of one can be resumed by
the other, on any number of ranks. Losses come weighted: their sum over all micro-steps and ranks is the mean over the
step's tokens. Gradients are therefore summed, never averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist

from gpt2.config.train import OptimConfig
from gpt2.distributed import World
from gpt2.model.gpt import GPT
from gpt2.train.optim import build_optimizer

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(idx (B, T), targets (B, T)) -> mean loss"""
BUCKET_BYTES = 32 << 20
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of one parameter; a checkpoint holds them as "<parameter>/<key>\""""


class ParallelModel(ABC):
    """A model, its gradients and its optimizer on all ranks. Every method is collective."""

    model: GPT
    world: World
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def backward(self, loss: Tensor, *, sync_gradients: bool) -> None:
        """Accumulate gradients; with `sync_gradients` (last micro-step) their sum over the ranks is complete."""

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Clip the gradients to a global L2 norm of max_norm; the norm before clipping, a scalar."""
        norm = full_tensor(nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), max_norm, norm)
        return norm

    def optimizer_step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @abstractmethod
    def full_parameters(self) -> AbstractContextManager[GPT]:
        """The model with all weights on this rank, for evaluation; inside, its forward pass is not collective."""

    @abstractmethod
    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights under their names and optimizer state as "<parameter>/exp_avg"; full tensors on rank 0 only."""

    @abstractmethod
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Broadcast and load what rank 0 has read from a checkpoint; other ranks pass an empty mapping."""


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, or the tensor itself; without importing torch.distributed.tensor, which is slow."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def broadcast_tensor(tensors: Mapping[str, Tensor], name: str, shape: torch.Size, world: World) -> Tensor:
    """Rank 0's tensor `name` on every rank."""
    if world.is_main:
        # a collective sends memory in storage order, which a transposed view is not
        return world.broadcast(tensors[name].to(world.device).contiguous())
    return world.broadcast(torch.empty(shape, device=world.device))


# ------------------------------------------------------------------------------------------------------ data parallel


class GradientBuckets:
    """All-reduces gradients in flat buckets of many tensors, overlapped with the backward pass.

    The buckets are fixed by the parameters' order. torch's DistributedDataParallel rebuilds its buckets after the first
    step; with three or more ranks the first step after a resume then rounds differently from the uninterrupted run.
    """

    def __init__(self, parameters: list[nn.Parameter], world: World) -> None:
        self.sync_gradients = False
        self._flat: list[Tensor] = []
        self._views: dict[nn.Parameter, Tensor] = {}
        self._bucket: dict[nn.Parameter, int] = {}
        self._missing: list[int] = []
        self._pending: list[dist.Work] = []
        self._sizes: list[int] = []
        for bucket in _split(parameters[::-1]):  # the backward pass reaches the last parameters first
            flat = torch.zeros(sum(p.numel() for p in bucket), device=world.device)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                self._views[parameter] = part.view_as(parameter)
                self._bucket[parameter] = len(self._flat)
                parameter.grad = self._views[parameter]
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
            self._flat.append(flat)
            self._sizes.append(len(bucket))
        self._missing = list(self._sizes)

    def zero_grad(self) -> None:
        torch._foreach_zero_(self._flat)

    def _on_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        view = self._views[parameter]
        if parameter.grad.data_ptr() != view.data_ptr():  # autograd or a kernel has replaced the tensor
            view.copy_(parameter.grad)
            parameter.grad = view
        if self.sync_gradients:
            self._missing[self._bucket[parameter]] -= 1
            # in bucket order: all ranks must launch the same sequence of collectives
            while len(self._pending) < len(self._flat) and self._missing[len(self._pending)] == 0:
                self._launch()

    def _launch(self) -> None:
        work = dist.all_reduce(self._flat[len(self._pending)], async_op=True)
        assert work is not None
        self._pending.append(work)

    def wait(self) -> None:
        """Wait for the sums; launches the buckets with a parameter that got no gradient."""
        while len(self._pending) < len(self._flat):
            self._launch()
        for work in self._pending:
            work.wait()
        self._pending, self._missing, self.sync_gradients = [], list(self._sizes), False


def _split(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() * 4 for p in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def partition_parameters(parameters: list[nn.Parameter], size: int) -> list[int]:
    """The rank that keeps the optimizer state of each parameter: largest first, each to the rank with the least."""
    loads, ranks = [0] * size, [0] * len(parameters)
    for i in sorted(range(len(parameters)), key=lambda i: -parameters[i].numel()):
        ranks[i] = loads.index(min(loads))
        loads[ranks[i]] += parameters[i].numel()
    return ranks


class DataParallel(ParallelModel):
    def __init__(self, model: GPT, config: OptimConfig, world: World, *, zero1: bool = False) -> None:
        self.model, self.world = model, world
        self.parameters = dict(model.named_parameters())
        parameters = list(self.parameters.values())
        ranks = partition_parameters(parameters, world.size)
        self.owner = dict(zip(self.parameters, ranks, strict=True)) if zero1 else None
        """zero1: parameter name -> rank that holds its optimizer state"""
        owned = [p for name, p in self.parameters.items() if self.owner is None or self.owner[name] == world.rank]
        self.optimizer = build_optimizer(owned, config)
        self.buckets = GradientBuckets(parameters, world) if world.size > 1 else None

    def backward(self, loss: Tensor, *, sync_gradients: bool) -> None:
        if self.buckets is not None:
            self.buckets.sync_gradients = sync_gradients
        loss.backward()
        if self.buckets is not None and sync_gradients:
            self.buckets.wait()

    def optimizer_step(self, lr: float) -> None:
        super().optimizer_step(lr)
        if self.owner is not None and self.world.size > 1:
            pending = [
                dist.broadcast(p.detach(), src=self.owner[name], async_op=True) for name, p in self.parameters.items()
            ]
            for work in pending:
                assert work is not None
                work.wait()
        # Neither fused AdamW nor a broadcast into `detach()` increments a weight's version, which marks bf16 copies of
        # it as stale.
        torch.autograd.graph.increment_version(list(self.parameters.values()))

    def zero_grad(self) -> None:
        if self.buckets is not None:
            self.buckets.zero_grad()
        else:
            super().zero_grad()

    def full_parameters(self) -> AbstractContextManager[GPT]:
        return nullcontext(self.model)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, parameter.detach()
        for name, parameter in self.parameters.items():
            owner = 0 if self.owner is None else self.owner[name]
            for key in MOMENTS:
                if owner == self.world.rank == 0:
                    yield f"{name}/{key}", self.optimizer.state[parameter][key]
                elif owner == self.world.rank:
                    dist.send(self.optimizer.state[parameter][key], dst=0)
                elif owner != 0 and self.world.is_main:
                    received = torch.empty(() if key == "step" else parameter.shape, device=self.world.device)
                    dist.recv(received, src=owner)
                    yield f"{name}/{key}", received

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(broadcast_tensor(tensors, name, parameter.shape, self.world))
            for key in MOMENTS:
                shape = torch.Size() if key == "step" else parameter.shape
                value = broadcast_tensor(tensors, f"{name}/{key}", shape, self.world)
                if parameter in self.optimizer.state:
                    self.optimizer.state[parameter][key].copy_(value)
