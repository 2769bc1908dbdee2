"""The processes of one run. The environment that torchrun sets is read here and nowhere else."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

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
    store: dist.Store | None = field(default=None, compare=False)
    """torchrun's key-value store: what must be said while a collective hangs"""

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
        return self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def each(self, value: float) -> list[float]:
        """The number that every process gives, by rank."""
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.size)))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values on every process, in place; the same tensor, which must be contiguous."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value, of anything that JSON can hold, on every process."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode()
        length = self.broadcast(torch.tensor(len(text), device=self.device))
        data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return json.loads(bytes(self.broadcast(data).tolist()))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def tell(self, key: str, value: str = "") -> None:
        """Leave word for the other processes, whatever they are doing."""
        if self.store is not None:
            with suppress(RuntimeError):  # the store is gone with torchrun
                self.store.set(f"gpt2/{key}", value)

    def heard(self, key: str, *, if_gone: bool = True) -> bool:
        """Whether some process left word under `key`; does not wait.

        Args:
            if_gone: the answer where torchrun is gone, and all is over.
        """
        if self.store is None:
            return False
        try:
            return self.store.check([f"gpt2/{key}"])
        except RuntimeError:
            return if_gone

    def first_to_say(self, key: str) -> bool:
        """Leave word under `key`; whether no other process had."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"gpt2/{key}", 1) == 1
        except RuntimeError:
            return False  # torchrun is gone: it is ending all of us

    def wait_for(self, key: str) -> str:
        """What rank 0 says under `key`, however long that takes."""
        assert self.store is not None
        self.store.wait([f"gpt2/{key}"], FOREVER)
        return self.store.get(f"gpt2/{key}").decode()


FOREVER = timedelta(days=365)
SOLO = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def from_env(device: str | None = None) -> World:
    """Join the run that torchrun started, or be the only process; as `locate`."""
    world = locate(device)
    join(world)
    return world


def locate(device: str | None = None) -> World:
    """This process's place in the run that torchrun started, or that of an only process.

    Each process takes the GPU of its local rank; without GPUs all use the CPU. Collectives work after `join`.

    Args:
        device: "cpu" to leave the GPUs alone.
    """
    rank, local_rank, size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives the same bits each time only with it
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    store = None
    if size > 1:
        rendezvous, _, _ = next(dist.rendezvous("env://"))
        # torchrun may start the processes again; each start has its own keys
        store = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", rendezvous)
    return World(rank, local_rank, size, place, store)


def join(world: World, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Let the processes talk: NCCL between GPUs, gloo between CPUs.

    Args:
        timeout: how long a collective waits for a process that hangs before this one gives up.
    """
    if world.store is not None:
        on_gpu = world.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=world.store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=world.device if on_gpu else None,
        )


def leave() -> None:
    """End the communication between the processes, if there is any."""
    if dist.is_initialized():
        dist.destroy_process_group()
