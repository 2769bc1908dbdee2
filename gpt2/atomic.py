"""Files that are written whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2.errors import NO_SPACE, UserError


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that becomes `path` when the block ends without an exception.

    The data is on disk before the name is (fsync of the file, rename, fsync of the folder). After an exception the
    temporary file is gone and whatever stood at `path` still stands. After a kill a `.*.tmp` file may be left;
    nothing ever reads one.

    Raises:
        UserError: no space is left on the device.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(f"no space left for {path}: free some and run again, finished work is kept") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


def fsync_dir(path: Path) -> None:
    """Make renames inside folder `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
