"""Scratch directories in the store, for the copies of the weights that registering a model makes."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.mlflow_runs import locked

PREFIX = ".registry-"


@contextmanager
def scratch_directory(store: Path) -> Iterator[Path]:
    """A directory that MLflow's temporary files also use; deleted at the end, with those of killed processes."""
    with locked(store / ".mlflow" / "lock"):  # a directory whose lock is not held yet is not deleted
        for stale in store.glob(f"{PREFIX}*"):
            with open(stale / "lock", "w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale)
        directory = Path(tempfile.mkdtemp(dir=store, prefix=PREFIX))
        lock = open(directory / "lock", "w")  # noqa: SIM115 - held until the directory is deleted
        fcntl.flock(lock, fcntl.LOCK_EX)
    default = tempfile.gettempdir()
    try:
        tempfile.tempdir = str(directory)
        yield directory
    finally:
        tempfile.tempdir = default
        shutil.rmtree(directory)
        lock.close()
