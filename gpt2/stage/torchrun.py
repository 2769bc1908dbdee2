"""The frame of the stages that use torch: `python -m gpt2.<stage> DIRECTORY`, or the same under torchrun.

Rank 0 holds the directory's lock. The other ranks wait until it says whether there is work left. A rank that fails
exits at once: it must not wait for threads, or for collectives that the other ranks no longer join.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from gpt2.distributed import World, destroy_process_group, init_process_group, world_from_env
from gpt2.errors import REFUSED, UserError
from gpt2.machine import keep_compiled
from gpt2.stage.directory import StageDir
from gpt2.stage.failure import Failure, clear_failure, error_message, read_failure, write_failure


class Interrupted(Exception):
    """A signal asked this run to end, and everything is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}, everything is saved; run it again to go on")
        self.status = 128 + number
        """exit status, as a shell reports it: 143 for SIGTERM, 130 for SIGINT"""


def main(work: Callable[[StageDir, World], None], directory: str) -> int:
    """Run `work` on a stage's directory as one rank.

    Returns:
        The exit status: 0, or 128 + the signal's number after an interruption, or as `report_failure`.
    """
    world: World | None = None
    try:
        path = Path(directory)
        runtime = StageDir(path).runtime
        world = world_from_env("cpu" if runtime.gpus == 0 else None)
        set_determinism(runtime.deterministic)
        keep_compiled()
        run(work, path, world)
    except Interrupted as interrupted:
        if world is not None and world.is_main:
            print(interrupted, file=sys.stderr, flush=True)
            if read_failure(path) is None:  # else torchrun ends this rank because another one failed
                write_failure(path, Failure(kind="interrupted", message=str(interrupted)))
        return interrupted.status
    except BaseException as error:
        if world is not None and world.is_published("saved"):
            return 143  # rank 0 saved after a signal and exited; this failure is only that it is gone
        return report_failure(error, world, Path(directory))
    return 0


def run(work: Callable[[StageDir, World], None], path: Path, world: World) -> None:
    """Lock the directory and call `work`, unless the stage is finished already."""
    directory = StageDir(path)
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(directory.lock())
            clear_failure(path)
            finished = not directory.begin()
            world.publish("locked", "finished" if finished else "go on")
        else:
            finished = world.wait_for("locked") == "finished"
        if finished:
            return
        init_process_group(world)
        work(directory, world)
        world.barrier()
        destroy_process_group()


def set_determinism(mode: bool | Literal["auto"]) -> None:
    """Make torch use only algorithms that give the same bits each time, and refuse those without such a form.

    Args:
        mode: "auto": deterministic where there is no GPU.
    """
    deterministic = not torch.cuda.is_available() if mode == "auto" else mode
    torch.use_deterministic_algorithms(deterministic)
    if deterministic and torch.cuda.is_available():
        from torch._inductor import config as inductor

        if hasattr(inductor, "deterministic"):
            inductor.deterministic = True  # otherwise it picks kernels by their measured speed
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time


def report_failure(error: BaseException, world: World | None, directory: Path | None = None) -> int:
    """Print why this rank failed and write failure.json into `directory`, unless another rank failed first.

    Returns:
        The exit status: 2 for a message to the user, which is one line; 1 for anything else, with a traceback.
    """
    message = error_message(error)
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in REFUSED):
        status, lines = 2, [f"error: {message}"]
    else:
        status, lines = 1, "".join(traceback.format_exception(error)).rstrip().split("\n")
    prefix = f"[rank {world.rank}] " if world is not None and world.size > 1 and status == 1 else ""
    if world is not None and not world.publish_first("failed"):
        lines = ["exiting: another rank failed first (see its traceback)"]
    else:
        if status == 1:
            get_error_handler().record_exception(error)  # for torchrun's summary
        if directory is not None:
            rank = 0 if world is None else world.rank
            write_failure(directory, Failure(kind="user" if status == 2 else "crash", message=message, rank=rank))
    print("\n".join(prefix + line for line in lines), file=sys.stderr, flush=True)
    return status


def exit_now(status: int) -> NoReturn:
    """Exit without waiting for threads or collectives."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
