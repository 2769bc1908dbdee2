"""The SQLite databases in a store, Prefect's and MLflow's: owner-only, checked, and never migrated by two processes.

Results do not depend on either. Prefect's holds the history of flow runs. MLflow's is rebuilt from the store: the
command of a run sends everything again.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from flows.environment import note

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
BUSY_SECONDS = 60.0
"""time that SQLite waits for another process's transaction"""


def prefect_database(store: Path) -> Path:
    """The database of the embedded server, and of the one that `make up` starts."""
    return store / ".prefect" / "prefect.db"


def mlflow_database(store: Path) -> Path:
    return store / "mlflow.db"


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold the store's databases while one is checked or migrated: two migrations of one database break each other."""
    folder = prefect_database(store).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another process starts a server on {store}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_ready(path: Path) -> None:
    """Move a damaged database aside, and create a missing one with access for its owner only.

    Raises:
        OSError: the folder cannot be written to.
    """
    if damage := find_damage(path):
        aside = _move_aside(path)
        note(f"{path} is damaged ({damage}); it is now {aside}, and a new one takes its place")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's journals get the same permissions


def find_damage(path: Path) -> str | None:
    """What SQLite finds wrong in the file; None if it is intact or missing, or cannot be checked now."""
    if not path.is_file():
        return None
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", timeout=BUSY_SECONDS, uri=True)
        ) as database:
            found = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:  # another process's lock, or the disk's error, is not damage
        return str(error) if error.sqlite_errorcode & 0xFF in DAMAGED else None
    return None if found == "ok" else " ".join(found.split())


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("-wal", "-shm", "-journal", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    return aside
