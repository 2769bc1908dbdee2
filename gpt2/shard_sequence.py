"""One stream of tokens cut into shards, and where in the corpus each ends, so that work can go on after a kill."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from gpt2.config import Section
from gpt2.errors import UserError
from gpt2.manifest import Skipped, read_model, sha256_file, write_model
from gpt2.shards import HEADER_BYTES, TOKEN, ShardWriter, Tokens, read_header

FOLDER = "shards"
PROGRESS = "progress.json"
AT_ONCE = 4
"""full shards on their way to disk: what a kill may cost, with the one that is being written"""


class Place(Section):
    """A place in the stream: so many tokens into a unit. What is skipped belongs to the place where it was met."""

    unit: int = 0
    tokens: int = 0


class WholeShard(Section):
    """A shard that is on disk, and what had been seen of the corpus when it was full."""

    path: str
    """relative to the stage's directory"""
    tokens: int
    documents: int
    sha256: str
    end: Place
    skipped: tuple[Skipped, ...] = ()
    """since the end of the shard before"""


class Progress(Section):
    """progress.json: written with every shard."""

    plan: str
    """fingerprint of the units and of how they are cut into shards; work on another plan starts over"""
    shards: tuple[WholeShard, ...] = ()


def shard_name(prefix: str, index: int, n_val: int = 1) -> str:
    """Of shard `index`, the first `n_val` of which are for validation; relative to the stage's directory."""
    split = "val" if index < n_val else "train"
    return f"{FOLDER}/{prefix}_{split}_{index:06d}.bin"


def split_of(path: str) -> Literal["val", "train"]:
    return "val" if "_val_" in Path(path).name else "train"


class Folder:
    """Where whole shards go: a stage's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def free(self) -> int | None:
        """Bytes of space that is left; None: nobody can say."""
        return shutil.disk_usage(self.path).free

    def local(self, name: str) -> Path:
        """Where shard `name` is written."""
        return self.path / name

    def keep(self, name: str) -> None:
        """Shard `name` is whole."""

    def size(self, name: str) -> int | None:
        """Bytes of a shard that was kept; None: it is not there, or is no shard."""
        try:
            return HEADER_BYTES + TOKEN.itemsize * read_header(self.path / name)
        except UserError:
            return None

    def names(self) -> list[str]:
        """Everything that lies in the shards' folder."""
        folder = self.path / FOLDER
        return [f"{FOLDER}/{path.name}" for path in folder.iterdir()] if folder.exists() else []

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def read_progress(self) -> Progress | None:
        try:
            return read_model(self.path / PROGRESS, Progress)
        except (FileNotFoundError, UserError):
            return None

    def write_progress(self, progress: Progress) -> None:
        write_model(self.path / PROGRESS, progress)


class ShardSequence:
    """Writes the stream; `shards` are the whole ones so far, those of earlier runs included.

    Args:
        folder: where the shards go.
        plan: fingerprint of everything that decides the bytes.
        first, others: tokens of the first shard and of each that follows.
    """

    def __init__(self, folder: Folder, prefix: str, plan: str, first: int, others: int) -> None:
        self._folder, self._prefix, self._plan = folder, prefix, plan
        self._limits = first, others
        self._writer: ShardWriter | None = None
        self._skipped: list[Skipped] = []
        # Full shards are brought to disk and hashed while the next ones are being written.
        self._disk = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="disk")
        self._pending: deque[Future[WholeShard]] = deque()
        self.shards = list(self._kept())
        self.start = self.shards[-1].end if self.shards else Place()
        self._before = sum(shard.tokens for shard in self.shards)  # of the shard that is being written
        self._number = len(self.shards)
        self._here = Place(unit=self.start.unit)
        kept = {shard.path for shard in self.shards}
        for name in folder.names():
            if name not in kept:
                folder.remove(name)

    @property
    def tokens(self) -> int:
        """In the stream so far."""
        return self._before + (self._writer.tokens if self._writer else 0)

    def write(self, unit: int, tokens: Tokens, skipped: tuple[Skipped, ...] = ()) -> None:
        """Append what comes next in `unit`; what an earlier run wrote already is left out.

        Raises:
            UserError: no space is left on the device.
        """
        if unit != self._here.unit:
            self._here = Place(unit=unit)
        start = self._here.tokens
        self._here = Place(unit=unit, tokens=start + len(tokens))
        known = self.start.tokens - start if unit == self.start.unit else 0
        if known <= 0:
            self._skipped += skipped
        position = max(known, 0)
        while self._pending and self._pending[0].done():
            self._record()
        while position < len(tokens):
            if self._writer is None:
                self._writer = ShardWriter(self._folder.local(shard_name(self._prefix, self._number)))
            limit = self._limits[min(self._number, 1)]
            part = tokens[position : position + limit - self._writer.tokens]
            self._writer.write(part)
            position += len(part)
            if self._writer.tokens == limit:
                self._whole(Place(unit=unit, tokens=start + position))

    def finish(self, units: int) -> tuple[WholeShard, ...]:
        """End the stream after `units` units; all its shards.

        Raises:
            UserError: no space is left on the device.
        """
        if self._writer is not None:
            self._whole(Place(unit=units))
        while self._pending:
            self._record()
        self._disk.shutdown()
        if self._skipped and self.shards:  # what was met after the last token
            last = self.shards[-1]
            self.shards[-1] = last.model_copy(update={"skipped": (*last.skipped, *self._skipped)})
        return tuple(self.shards)

    def discard(self) -> None:
        """After an error: give up the shard that is not whole, keep the others."""
        try:
            while self._pending:
                self._record()
        finally:
            self._disk.shutdown()
            if self._writer is not None:
                self._writer.discard()

    def _whole(self, end: Place) -> None:
        assert self._writer is not None
        if len(self._pending) == AT_ONCE:
            self._record()
        writer, self._writer = self._writer, None
        skipped, self._skipped = tuple(self._skipped), []
        self._pending.append(self._disk.submit(self._to_disk, writer, self._number, end, skipped))
        self._before += writer.tokens
        self._number += 1

    def _to_disk(self, writer: ShardWriter, index: int, end: Place, skipped: tuple[Skipped, ...]) -> WholeShard:
        writer.close()
        shard = WholeShard(
            path=shard_name(self._prefix, index),
            tokens=writer.tokens,
            documents=writer.documents,
            sha256=sha256_file(writer.path),
            end=end,
            skipped=skipped,
        )
        self._folder.keep(shard.path)
        return shard

    def _record(self) -> None:
        """Wait for the oldest of the shards that are on their way to disk, and write it down."""
        self.shards.append(self._pending.popleft().result())
        self._folder.write_progress(Progress(plan=self._plan, shards=tuple(self.shards)))

    def _kept(self) -> Iterator[WholeShard]:
        """The shards of earlier runs that can be kept: of the same plan, and there with the right size."""
        progress = self._folder.read_progress()
        for shard in progress.shards if progress and progress.plan == self._plan else ():
            if self._folder.size(shard.path) != HEADER_BYTES + TOKEN.itemsize * shard.tokens:
                return
            yield shard
