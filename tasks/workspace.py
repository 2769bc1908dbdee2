"""The folder in the store for the copies of the weights that registering a model makes."""

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
def workspace(store: Path) -> Iterator[Path]:
    """A folder for the copies of the weights that registering needs, MLflow's temporary ones included; it is removed
    at the end, and so are the folders that killed processes left."""
    with locked(store / ".mlflow" / "lock"):  # a folder without its lock yet is not taken for a dead one
        for left in store.glob(f"{PREFIX}*"):
            with open(left / "lock", "w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
        folder = Path(tempfile.mkdtemp(dir=store, prefix=PREFIX))
        lock = open(folder / "lock", "w")  # noqa: SIM115 - held for as long as the folder is there
        fcntl.flock(lock, fcntl.LOCK_EX)
    usual = tempfile.gettempdir()
    try:
        tempfile.tempdir = str(folder)
        yield folder
    finally:
        tempfile.tempdir = usual
        shutil.rmtree(folder)
        lock.close()
