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
def gpus_held(count: int, what: str, on_wait: Callable[[str], None]) -> Iterator[tuple[int, ...]]:
    """Hold this host's first `count` visible GPUs for as long as any process has the yielded descriptors open.

    A kernel lock on one file per physical GPU, named after its UUID: two trainings never share a GPU, whichever user
    started them and however CUDA_VISIBLE_DEVICES names it, and a killed holder lets go. Handed to the child, the locks
    last until the child's end, not only until this process's.

    Raises:
        UserError: the lock's file cannot be opened.
    """
    with ExitStack() as stack:
        held = []
        # sorted, so that no two runs wait for each other
        for uuid, number in sorted((gpu.uuid, gpu.number) for gpu in visible_gpus()[:count]):
            path = Path(tempfile.gettempdir()) / f"gpt2-gpu-{re.sub(r'[^A-Za-z0-9-]', '_', uuid)}.lock"
            file = stack.enter_context(_open_for_all(path))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file.fileno(), 1000, 0).decode(errors="replace").strip()
                on_wait(f"GPU {number} is held by {holder or 'another run'}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(OSError):  # the name is for people; the lock holds without it
                os.ftruncate(file.fileno(), 0)
                os.pwrite(file.fileno(), f"process {os.getpid()}: {what}".encode(), 0)
            held.append(file.fileno())
        yield tuple(held)


def _open_for_all(path: Path) -> IO[bytes]:
    """Open a lock's file in a folder that all users share; the first one makes it.

    A file of another user is opened without O_CREAT, which Linux refuses there (fs.protected_regular), and for reading
    where its mode allows no more, which is enough for flock.
    """
    try:
        with suppress(FileExistsError):
            made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            os.fchmod(made, 0o666)  # whatever the umask is
            return open(made, "r+b", buffering=0)
        try:
            return open(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b", buffering=0)
        except PermissionError:
            return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{describe(error)}: remove it, or make it readable for all users") from error
