"""The processes of a distributed run. Only this module reads the environment that torchrun sets."""

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
    """This process and the process group. Passed as an argument to code that communicates."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    store: dist.Store | None = field(default=None, compare=False)
    """torchrun's key-value store: works while a collective hangs"""

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
        """Each number summed over the processes in float64."""
        return self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def all_gather(self, value: float) -> list[float]:
        """The value of every process, ordered by rank."""
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.size)))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values on every process, in place; the same tensor, which must be contiguous."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's JSON-serializable value on every process."""
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

    def publish(self, key: str, value: str = "") -> None:
        """Set a key in the store, without a collective."""
        if self.store is not None:
            with suppress(RuntimeError):  # the store is gone with torchrun
                self.store.set(f"gpt2/{key}", value)

    def is_published(self, key: str, *, if_gone: bool = True) -> bool:
        """Whether a process set `key`; does not wait.

        Args:
            if_gone: the return value if torchrun, which hosts the store, has exited.
        """
        if self.store is None:
            return False
        try:
            return self.store.check([f"gpt2/{key}"])
        except RuntimeError:
            return if_gone

    def publish_first(self, key: str) -> bool:
        """Count this process under `key`; whether it is the first one."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"gpt2/{key}", 1) == 1
        except RuntimeError:
            return False  # torchrun has exited and ends all ranks

    def wait_for(self, key: str) -> str:
        """Wait for `key` without a time limit; its value."""
        assert self.store is not None
        self.store.wait([f"gpt2/{key}"], FOREVER)
        return self.store.get(f"gpt2/{key}").decode()


FOREVER = timedelta(days=365)
SINGLE_PROCESS = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def init_world(device: str | None = None) -> World:
    """Read the environment and initialize the process group; see `world_from_env`."""
    world = world_from_env(device)
    init_process_group(world)
    return world


def world_from_env(device: str | None = None) -> World:
    """The World that torchrun's environment describes; a single process without torchrun.

    Each process uses the GPU of its local rank, or the CPU without GPUs. Collectives work after `init_process_group`.

    Args:
        device: "cpu" to use no GPU.
    """
    rank, local_rank, size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic cuBLAS
    torch_device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(torch_device)
    store = None
    if size > 1:
        rendezvous, _, _ = next(dist.rendezvous("env://"))
        # torchrun may restart the processes; each start has its own keys
        store = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", rendezvous)
    return World(rank, local_rank, size, torch_device, store)


def init_process_group(world: World, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Initialize the default process group: NCCL between GPUs, gloo between CPUs.

    Args:
        timeout: of a collective whose other ranks hang.
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


def destroy_process_group() -> None:
    """Destroy the default process group, if it exists."""
    if dist.is_initialized():
        dist.destroy_process_group()
