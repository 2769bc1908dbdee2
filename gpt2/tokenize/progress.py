"""Progress of the tokenize stage, in bytes of input: metrics.jsonl every second, the terminal every five seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from gpt2.stage.metrics import MetricsWriter
from gpt2.tokenize.reading import WorkUnit
from gpt2.tokenize.shard_sequence import ShardSequence


class TokenizeProgress:
    """As a context manager, it also prints a line when no part arrives for QUIET_SECONDS: text that cannot be cut is
    encoded as a whole."""

    METRICS_SECONDS, PRINT_SECONDS, QUIET_SECONDS = 1.0, 5.0, 10.0

    def __init__(self, metrics: MetricsWriter | None, units: Sequence[WorkUnit], shards: ShardSequence) -> None:
        self._metrics, self._shards = metrics, shards
        self._total = sum(unit.size for unit in units)
        self._done = sum(unit.size for unit in units[: shards.start.unit])
        self._done_before, self._tokens_before = self._done, shards.tokens
        self._started = self._last_metrics = self._last_print = self._last_part = time.monotonic()
        self._unit, self._names = shards.start.unit, [unit.name for unit in units]
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)
        if shards.shards:
            kept = f"{len(shards.shards)} whole shards of an earlier run are kept, {shards.tokens:,} tokens"
            print(f"tokenize: {kept}", flush=True)

    def add(self, unit: int, consumed: int) -> None:
        """Count `consumed` more bytes of unit number `unit`."""
        self._done += consumed
        self._unit, self._last_part = unit, time.monotonic()
        if time.monotonic() - self._last_metrics >= self.METRICS_SECONDS:
            self.report(unit)

    def __enter__(self) -> TokenizeProgress:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.QUIET_SECONDS):
            quiet = time.monotonic() - self._last_part
            if quiet >= self.QUIET_SECONDS and self._unit < len(self._names):
                print(
                    f"tokenize: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, no output for {quiet:,.0f} s "
                    f"in {self._names[self._unit]} or the file after it; tokenize.max_document_bytes limits documents",
                    flush=True,
                )

    def report(self, unit: int, last: bool = False) -> None:
        """Write one line of metrics, and print one if PRINT_SECONDS have passed or it is the `last`."""
        now = self._last_metrics = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        tokens = self._shards.tokens
        rate = (tokens - self._tokens_before) / seconds  # without the tokens of an earlier run
        figures = {"tokenize/tokens": tokens, "tokenize/tokens_per_second": round(rate)}
        done = self._total if last else min(self._done, self._total)
        if self._metrics is not None:
            self._metrics.write(unit, done=done, total=self._total, unit="bytes", **figures)
        if now - self._last_print >= self.PRINT_SECONDS or last:
            self._last_print = now
            left = (self._total - done) * seconds / max(done - self._done_before, 1)
            ending = f"in {seconds:,.1f} s" if last else f"{left:,.0f} s left"
            sizes = f"{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
            print(f"tokenize: {sizes}, {tokens:,} tokens, {rate / 1e6:,.2f} M tokens/s, {ending}", flush=True)
