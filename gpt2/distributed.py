"""The processes of one run. The environment that torchrun sets is read here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class World:
    """This process among those of the run. Passed to whatever has to agree across processes."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: writes metrics, checkpoints and the manifest."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes, in place; the same tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum(self, *values: float) -> list[float]:
        """Each number summed over the processes, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.all_reduce(tensor).tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process: what all of them must decide alike."""
        return self.sum(float(flag))[0] > 0

    def broadcast(self, value: object) -> object:
        """Rank 0's value on every process; any picklable object, which never leaves the run's own processes."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0, device=self.device)
            return box[0]
        return value

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


SOLO = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def from_env(device: str | None = None, timeout: timedelta = timedelta(minutes=10)) -> World:
    """Join the run that torchrun started, or be the only process.

    Each process takes the GPU of its local rank and talks NCCL; without GPUs all use the CPU and gloo.

    Args:
        device: "cpu" to leave the GPUs alone.
        timeout: how long a collective waits for a process that hangs before this one gives up.
    """
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in
                              (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip
    on_gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=place if on_gpu else None)
    return World(rank, local_rank, size, place)


def leave() -> None:
    """End the communication between the processes, if there is any."""
    if dist.is_initialized():
        dist.destroy_process_group()
