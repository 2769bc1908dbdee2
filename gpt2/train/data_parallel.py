"""How weights, gradients and optimizer state lie on the processes; the training loop does not see which way it is.

`Replicas`: every process holds all weights, and gradients are summed over the processes (data parallel); with zero1
the optimizer state is dealt out, tensor by tensor (Rajbhandari et al., arXiv:1910.02054, stage 1).
`gpt2.train.fsdp.Shards`: every tensor is cut up over the processes.

Both give and take checkpoints as whole tensors under the parameters' names, so one may continue the other, on any
number of processes. Losses come weighted, so that their sum over all micro-steps and processes is the mean over the
step's tokens, and gradients are summed, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from gpt2.config.train import OptimConfig
from gpt2.distributed import World
from gpt2.model.gpt import GPT
from gpt2.train.optim import build_optimizer, set_learning_rate

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(idx (B, T), targets (B, T)) -> mean loss"""
BUCKET_BYTES = 32 << 20


class Parallel(Protocol):
    """What the training loop asks of either way."""

    model: GPT

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradients; after the `last` micro-step of a step they are summed over the processes."""

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradients down to a global norm of at most max_norm; their norm before that, a scalar."""

    def step(self, lr: float) -> None:
        """Change the weights by the gradients."""

    def clear(self) -> None:
        """Forget the gradients."""

    def whole(self) -> AbstractContextManager[GPT]:
        """The model with every weight there, for evaluation: inside, each process may run it as often as it likes."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight, and as "<parameter>/exp_avg" each optimizer moment, whole on rank 0; all must iterate."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what rank 0 read from a checkpoint (elsewhere empty); every process must call it."""


# ----------------------------------------------------------------------------------------------------------- replicas


class Buckets:
    """Sums gradients over the processes, many small tensors at a time, while the backward pass is still going on.

    Gradients live in flat buffers that are cut once, by the parameters' order. (torch's DistributedDataParallel cuts
    them anew after the first step; a sum over three or more processes then rounds differently in the first step after
    a resume than it did in the run that went on.)
    """

    def __init__(self, parameters: list[nn.Parameter], world: World) -> None:
        self.summing = False
        self._flat: list[Tensor] = []
        self._views: dict[nn.Parameter, Tensor] = {}
        self._bucket: dict[nn.Parameter, int] = {}
        self._missing: list[int] = []
        self._pending: list[dist.Work] = []
        self._sizes: list[int] = []
        for bucket in _cut(parameters[::-1]):  # the backward pass reaches the last parameters first
            flat = torch.zeros(sum(p.numel() for p in bucket), device=world.device)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                self._views[parameter] = part.view_as(parameter)
                self._bucket[parameter] = len(self._flat)
                parameter.grad = self._views[parameter]
                parameter.register_post_accumulate_grad_hook(self._ready)
            self._flat.append(flat)
            self._sizes.append(len(bucket))
        self._missing = list(self._sizes)

    def clear(self) -> None:
        torch._foreach_zero_(self._flat)

    def _ready(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        view = self._views[parameter]
        if parameter.grad.data_ptr() != view.data_ptr():  # somebody put another tensor there
            view.copy_(parameter.grad)
            parameter.grad = view
        if self.summing:
            self._missing[self._bucket[parameter]] -= 1
            # strictly in order: the processes must agree on which sum is which
            while len(self._pending) < len(self._flat) and self._missing[len(self._pending)] == 0:
                self._launch()

    def _launch(self) -> None:
        work = dist.all_reduce(self._flat[len(self._pending)], async_op=True)
        assert work is not None
        self._pending.append(work)

    def finish(self) -> None:
        """Wait for the sums; a bucket with a parameter that got no gradient is summed now."""
        while len(self._pending) < len(self._flat):
            self._launch()
        for work in self._pending:
            work.wait()
        self._pending, self._missing, self.summing = [], list(self._sizes), False


def _cut(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() * 4 for p in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def owners(parameters: list[nn.Parameter], size: int) -> list[int]:
    """Which process keeps the optimizer state of each parameter: the largest first, each to whoever has least."""
    loads, owner = [0] * size, [0] * len(parameters)
    for i in sorted(range(len(parameters)), key=lambda i: -parameters[i].numel()):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += parameters[i].numel()
    return owner


class Replicas:
    def __init__(self, model: GPT, config: OptimConfig, world: World, *, zero1: bool = False) -> None:
        self.model, self.world = model, world
        self.names = dict(model.named_parameters())
        parameters = list(self.names.values())
        self.owner = dict(zip(self.names, owners(parameters, world.size), strict=True)) if zero1 else None
        mine = [p for name, p in self.names.items() if self.owner is None or self.owner[name] == world.rank]
        self.optimizer = build_optimizer(mine, config)
        self.buckets = Buckets(parameters, world) if world.size > 1 else None

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.buckets is not None:
            self.buckets.summing = last  # in the last micro-step only: one sum over the processes a step
        loss.backward()
        if self.buckets is not None and last:
            self.buckets.finish()

    def clip(self, max_norm: float | None) -> Tensor:
        gradients = [p.grad for p in self.names.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.names.values()), max_norm, norm)
        return norm

    def step(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        if self.owner is not None and self.world.size > 1:
            pending = [
                dist.broadcast(p.detach(), src=self.owner[name], async_op=True) for name, p in self.names.items()
            ]
            for work in pending:
                assert work is not None
                work.wait()
        # Neither fused AdamW nor a broadcast into `detach()` moves the version of a weight, by which whoever keeps a
        # copy in bf16 sees that it is an old one.
        torch.autograd.graph.increment_version(list(self.names.values()))

    def clear(self) -> None:
        if self.buckets is not None:
            self.buckets.clear()
        else:
            self.model.zero_grad(set_to_none=True)

    def whole(self) -> AbstractContextManager[GPT]:
        return nullcontext(self.model)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.names.items():
            yield name, parameter.detach()
        for name, parameter in self.names.items():
            owner = 0 if self.owner is None else self.owner[name]
            for key in MOMENTS:
                if owner == 0:
                    yield f"{name}/{key}", self._moment(parameter, key)
                elif self.world.rank == owner:
                    dist.send(self._moment(parameter, key), dst=0)
                elif self.world.is_main:
                    received = torch.empty(() if key == "step" else parameter.shape, device=self.world.device)
                    dist.recv(received, src=owner)
                    yield f"{name}/{key}", received

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        # a process that does not own the parameter has nothing to show, and nobody asks
        return self.optimizer.state[parameter][key] if parameter in self.optimizer.state else torch.empty(0)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.names.items():
            parameter.copy_(from_main(tensors, name, parameter.shape, self.world))
            for key in MOMENTS:
                shape = torch.Size() if key == "step" else parameter.shape
                value = from_main(tensors, f"{name}/{key}", shape, self.world)
                if parameter in self.optimizer.state:
                    self.optimizer.state[parameter][key].copy_(value)


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def from_main(tensors: Mapping[str, Tensor], name: str, shape: torch.Size, world: World) -> Tensor:
    """Rank 0's tensor of that name, on every process."""
    if world.is_main:
        # a collective sends memory as it lies, so a transposed view would arrive mixed up
        return world.broadcast(tensors[name].to(world.device).contiguous())
    return world.broadcast(torch.empty(shape, device=world.device))
