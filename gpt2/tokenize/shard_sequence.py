"""Cuts one stream of tokens into shards and records where in the corpus each ends, to resume after a kill."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from gpt2.shards import ShardWriter, Tokens
from gpt2.stage.facts import Skipped
from gpt2.stage.manifest import sha256_file
from gpt2.tokenize.shard_store import (
    SHARDS,
    ResumeState,
    ShardRecord,
    ShardStore,
    StreamPosition,
    shard_bytes,
    shard_name,
)

MAX_PENDING = 4
"""full shards that are being written to disk; a kill loses at most these and the one that is being filled"""


class ShardSequence:
    """Writes the stream. `shards` are the complete ones, including those of earlier runs.

    Args:
        plan: fingerprint of everything that decides the bytes, except for what `store` adds.
        first, others: tokens of the first shard and of each later one.
    """

    def __init__(self, store: ShardStore, prefix: str, plan: str, first: int, others: int) -> None:
        self._store, self._prefix, self._plan = store, prefix, store.fingerprint(plan)
        self._limits = first, others
        self._writer: ShardWriter | None = None
        self._skipped: list[Skipped] = []
        # Full shards are synced and hashed while the next ones are filled.
        self._disk = ThreadPoolExecutor(MAX_PENDING, thread_name_prefix="disk")
        self._pending: deque[Future[ShardRecord]] = deque()
        state = store.read_progress()
        self.shards = list(self._reusable(state))
        if state and state.plan != self._plan:
            print(f"tokenize: {len(state.shards)} shards of other inputs or settings are replaced", flush=True)
        self.start = self.shards[-1].end if self.shards else StreamPosition()
        self._before = sum(shard.tokens for shard in self.shards)  # tokens before the current shard
        self._number = len(self.shards)
        self._position = StreamPosition(unit=self.start.unit)
        kept = {shard.path for shard in self.shards}
        # The folder may hold other files: remove only recorded shards, and files with a shard's name.
        recorded = {shard.path for shard in state.shards} if state else set()
        shard_pattern = re.compile(rf"{SHARDS}/\.?{re.escape(prefix)}_(val|train)_\d{{6,}}\.bin(\.tmp)?")
        for name in store.names():
            if name not in kept and (name in recorded or shard_pattern.fullmatch(name)):
                store.remove(name)

    @property
    def tokens(self) -> int:
        """Number of tokens in the stream so far."""
        return self._before + (self._writer.tokens if self._writer else 0)

    def write(self, unit: int, tokens: Tokens, skipped: tuple[Skipped, ...] = ()) -> None:
        """Append the next tokens of `unit`, without those that an earlier run wrote.

        Raises:
            UserError: no space is left on the device.
        """
        if unit != self._position.unit:
            self._position = StreamPosition(unit=unit)
        start = self._position.tokens
        self._position = StreamPosition(unit=unit, tokens=start + len(tokens))
        written = self.start.tokens - start if unit == self.start.unit else 0
        if written <= 0:
            self._skipped += skipped
        position = max(written, 0)
        while self._pending and self._pending[0].done():
            self._record()
        while position < len(tokens):
            if self._writer is None:
                self._writer = ShardWriter(self._store.local(shard_name(self._prefix, self._number)))
            limit = self._limits[min(self._number, 1)]
            part = tokens[position : position + limit - self._writer.tokens]
            self._writer.write(part)
            position += len(part)
            if self._writer.tokens == limit:
                self._complete(StreamPosition(unit=unit, tokens=start + position))

    def finish(self, units: int) -> tuple[ShardRecord, ...]:
        """End the stream after `units` units and return all shards.

        Raises:
            UserError: no space is left on the device.
        """
        if self._writer is not None:
            self._complete(StreamPosition(unit=units))
        while self._pending:
            self._record()
        self._disk.shutdown()
        if self._skipped and self.shards:  # rows skipped after the last token
            last = self.shards[-1]
            self.shards[-1] = last.model_copy(update={"skipped": (*last.skipped, *self._skipped)})
        return tuple(self.shards)

    def discard(self) -> None:
        """After an error: delete the incomplete shard, keep the complete ones before the first that failed."""
        try:
            with suppress(Exception):  # the error that is being handled, or a consequence of it
                while self._pending:
                    self._record()
        finally:
            self._disk.shutdown()
            if self._writer is not None:
                self._writer.discard()

    def _complete(self, end: StreamPosition) -> None:
        assert self._writer is not None
        if len(self._pending) == MAX_PENDING:
            self._record()
        writer, self._writer = self._writer, None
        skipped, self._skipped = tuple(self._skipped), []
        self._pending.append(self._disk.submit(self._write_to_disk, writer, self._number, end, skipped))
        self._before += writer.tokens
        self._number += 1

    def _write_to_disk(
        self, writer: ShardWriter, index: int, end: StreamPosition, skipped: tuple[Skipped, ...]
    ) -> ShardRecord:
        writer.close()
        shard = ShardRecord(
            path=shard_name(self._prefix, index),
            tokens=writer.tokens,
            documents=writer.documents,
            sha256=sha256_file(writer.path),
            end=end,
            skipped=skipped,
        )
        self._store.keep(shard.path)
        return shard

    def _record(self) -> None:
        """Wait for the oldest pending shard and record it in progress.json.

        A shard that failed stays the oldest: recording later ones would leave a gap in the stream.
        """
        self.shards.append(self._pending[0].result())
        self._pending.popleft()
        self._store.write_progress(ResumeState(plan=self._plan, shards=tuple(self.shards)))

    def _reusable(self, state: ResumeState | None) -> Iterator[ShardRecord]:
        """The shards of earlier runs with the same plan, up to the first that is missing or has another size."""
        for index, shard in enumerate(state.shards if state and state.plan == self._plan else ()):
            if shard.path != shard_name(self._prefix, index):
                return
            if self._store.size(shard.path) != shard_bytes(shard.tokens):
                return
            yield shard
