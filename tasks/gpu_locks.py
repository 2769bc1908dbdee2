"""Locks on this host's GPUs, between all processes and users."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from gpt2.errors import UserError, describe
from gpt2.machine import visible_gpus


@contextmanager
def lock_gpus(count: int, holder: str, on_wait: Callable[[str], None]) -> Iterator[tuple[int, ...]]:
    """Lock this host's first `count` visible GPUs for as long as any process has the yielded descriptors open.

    One flock per physical GPU, on a file named after its UUID: two trainings never share a GPU, whichever user started
    them and however CUDA_VISIBLE_DEVICES names it. The kernel releases the lock of a killed process. A child that
    inherits the descriptors keeps the locks until it ends.

    Args:
        holder: shown to processes that wait for the same GPU.
        on_wait: called with a message before waiting for a GPU.

    Raises:
        UserError: a lock file cannot be opened.
    """
    with ExitStack() as stack:
        descriptors = []
        # sorted: two runs never wait for each other
        for uuid, number in sorted((gpu.uuid, gpu.number) for gpu in visible_gpus()[:count]):
            path = Path(tempfile.gettempdir()) / f"gpt2-gpu-{re.sub(r'[^A-Za-z0-9-]', '_', uuid)}.lock"
            file = stack.enter_context(_open_for_all(path))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = os.pread(file.fileno(), 1000, 0).decode(errors="replace").strip()
                on_wait(f"GPU {number} is locked by {other or 'another run'}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(OSError):  # the name is information only
                os.ftruncate(file.fileno(), 0)
                os.pwrite(file.fileno(), f"process {os.getpid()}: {holder}".encode(), 0)
            descriptors.append(file.fileno())
        yield tuple(descriptors)


def _open_for_all(path: Path) -> IO[bytes]:
    """Open a lock file in a directory that all users share, and create it if it is missing.

    Another user's file is opened without O_CREAT, which Linux refuses in such directories (fs.protected_regular), and
    read-only if its mode requires it: flock needs no more.
    """
    try:
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            os.fchmod(descriptor, 0o666)  # independent of the umask
            return open(descriptor, "r+b", buffering=0)
        try:
            return open(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b", buffering=0)
        except PermissionError:
            return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{describe(error)}: remove it, or make it readable for all users") from error
