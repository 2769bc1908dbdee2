"""Prefect's and MLflow's SQLite databases in a store: readable by their owner only, checked, migrated under a lock.

No result depends on them. Prefect's holds the history of flow runs; running a recipe again restores its MLflow run.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from flows.server_process import print_note

CORRUPTION_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
BUSY_SECONDS = 60.0
"""SQLite's timeout for another process's transaction"""


def prefect_database(store: Path) -> Path:
    """Database of the embedded server and of the server that `make up` starts."""
    return store / ".prefect" / "prefect.db"


def mlflow_database(store: Path) -> Path:
    return store / "mlflow.db"


@contextmanager
def database_lock(store: Path) -> Iterator[None]:
    """Lock the store's databases while one is checked or migrated: concurrent migrations corrupt a database."""
    directory = prefect_database(store).parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_note(f"another process is starting a server on {store}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_database(path: Path) -> None:
    """Rename a corrupt database, and create a missing one with access for its owner only.

    Raises:
        OSError: the directory is not writable.
    """
    if error := find_corruption(path):
        renamed = _rename_corrupt(path)
        print_note(f"{path} is corrupt ({error}); renamed to {renamed}, a new database replaces it")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's journals inherit the mode


def find_corruption(path: Path) -> str | None:
    """SQLite's error for the file; None if it is intact, missing, or locked by another process."""
    if not path.is_file():
        return None
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", timeout=BUSY_SECONDS, uri=True)
        ) as database:
            result = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:  # a lock or an I/O error is not corruption
        return str(error) if error.sqlite_errorcode & 0xFF in CORRUPTION_CODES else None
    return None if result == "ok" else " ".join(result.split())


def _rename_corrupt(path: Path) -> Path:
    target = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("-wal", "-shm", "-journal", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{target}{suffix}")
    return target
