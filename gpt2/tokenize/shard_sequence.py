"""One stream of tokens cut into shards, and where in the corpus each ends, so that work can go on after a kill."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from gpt2.shards import ShardWriter, Tokens
from gpt2.stage.facts import Skipped
from gpt2.stage.manifest import sha256_file
from gpt2.tokenize.shard_store import FOLDER, Folder, Place, Progress, WholeShard, shard_bytes, shard_name

AT_ONCE = 4
"""full shards on their way to disk: what a kill may cost, with the one that is being written"""


class ShardSequence:
    """Writes the stream; `shards` are the whole ones so far, those of earlier runs included.

    Args:
        folder: where the shards go.
        plan: fingerprint of everything that decides the bytes, but for what the folder adds.
        first, others: tokens of the first shard and of each that follows.
    """

    def __init__(self, folder: Folder, prefix: str, plan: str, first: int, others: int) -> None:
        self._folder, self._prefix, self._plan = folder, prefix, folder.fingerprint(plan)
        self._limits = first, others
        self._writer: ShardWriter | None = None
        self._skipped: list[Skipped] = []
        # Full shards are brought to disk and hashed while the next ones are being written.
        self._disk = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="disk")
        self._pending: deque[Future[WholeShard]] = deque()
        progress = folder.read_progress()
        self.shards = list(self._kept(progress))
        if progress and progress.plan != self._plan:
            count = len(progress.shards)
            print(f"tokenize: {count} shards of other input files or settings are made again", flush=True)
        self.start = self.shards[-1].end if self.shards else Place()
        self._before = sum(shard.tokens for shard in self.shards)  # of the shard that is being written
        self._number = len(self.shards)
        self._here = Place(unit=self.start.unit)
        kept = {shard.path for shard in self.shards}
        # What else lies there may be somebody's: only what we wrote down, or have names for, is ours to remove.
        ours = {shard.path for shard in progress.shards} if progress else set()
        form = re.compile(rf"{FOLDER}/\.?{re.escape(prefix)}_(val|train)_\d{{6,}}\.bin(\.tmp)?")
        for name in folder.names():
            if name not in kept and (name in ours or form.fullmatch(name)):
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
        """After an error: give up the shard that is not whole, keep the others, up to the first that failed."""
        try:
            with suppress(Exception):  # it is that error, or would take its place
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
        """Wait for the oldest of the shards that are on their way to disk, and write it down.

        One that failed stays the oldest: to write down what follows it would leave a hole in the stream.
        """
        self.shards.append(self._pending[0].result())
        self._pending.popleft()
        self._folder.write_progress(Progress(plan=self._plan, shards=tuple(self.shards)))

    def _kept(self, progress: Progress | None) -> Iterator[WholeShard]:
        """The shards of earlier runs that can be kept: of the same plan, without a gap, there with the right size."""
        for index, shard in enumerate(progress.shards if progress and progress.plan == self._plan else ()):
            if shard.path != shard_name(self._prefix, index):
                return
            if self._folder.size(shard.path) != shard_bytes(shard.tokens):
                return
            yield shard
