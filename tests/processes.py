"""Running a function in several real processes that talk gloo, as under torchrun."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from gpt2.distributed import World, destroy_process_group, init_world


def run_processes(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """work(world, *arguments) in `size` processes; what each returned, by rank."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        multiprocessing.spawn(_start, (size, port, Path(folder), work, arguments), nprocs=size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def _start(rank: int, size: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    world: World = init_world("cpu")
    (folder / str(rank)).write_bytes(pickle.dumps(work(world, *arguments)))
    destroy_process_group()
