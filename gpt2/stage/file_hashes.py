"""sha256 of files: remembered by path and stamp, so that a large file is read again only after it was touched."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gpt2.atomic import write_text
from gpt2.errors import UserError
from gpt2.machine import cpu_count


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Stamp(NamedTuple):
    """What the file system says about a file. A program can set mtime back, as `cp -p` does, but not ctime; a file that
    replaces another has another inode."""

    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int

    @staticmethod
    def of(path: Path) -> Stamp:
        stat = path.stat()
        return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


class Hashes:
    """sha256 of local files, remembered in `<store>/hashes.json` by path and stamp."""

    RACY_NS = 2_000_000_000
    """a file changed this short a time ago may change again within the same time stamp, so it is not remembered"""

    def __init__(self, store: Path, *, verify: bool = False) -> None:
        """
        Args:
            verify: read every file, whatever is remembered of it.
        """
        self.path = store / "hashes.json"
        self.verify = verify

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Hash `paths`, several at a time; those known already are not read.

        Raises:
            UserError: a file cannot be read or is being written.
        """
        if not paths:
            return []
        paths = [path.resolve() for path in paths]  # a link in the store and what it points to are read once
        known = self._read()
        with ThreadPoolExecutor(min(8, cpu_count())) as pool:  # hashlib lets go of the interpreter lock
            entries = list(pool.map(lambda path: self._entry(path, known.get(str(path))), paths))
        settled = time.time_ns() - self.RACY_NS
        new = {
            str(path): entry
            for path, entry in zip(paths, entries, strict=True)
            if max(entry["mtime_ns"], entry["ctime_ns"]) < settled and known.get(str(path)) != entry
        }
        if new:
            with suppress(OSError):  # a store that is read-only: the files are read again next time
                write_text(self.path, json.dumps(self._read() | new, indent=1, sort_keys=True) + "\n")
        return [entry["sha256"] for entry in entries]

    def _entry(self, path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
        try:
            before = Stamp.of(path)
            stamp = before._asdict()
            if not self.verify and known is not None and known.items() >= stamp.items():
                return known
            sha256 = sha256_file(path)
            after = Stamp.of(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if after != before:
            raise UserError(f"{path} is being written ({before.size:,} bytes, then {after.size:,}): wait for it")
        return {**stamp, "sha256": sha256}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # losing what is remembered costs a second reading, nothing else
        return known if isinstance(known, dict) else {}
