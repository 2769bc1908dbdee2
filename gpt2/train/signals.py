"""SIGTERM and SIGINT save a checkpoint before the run exits; a step that hangs is reported.

Python runs signal handlers in the main thread, between bytecode instructions: never while it waits in a collective or
a long kernel. A thread therefore reads signal numbers from the wake-up file descriptor. Where a snapshot of the
weights is in memory, that thread itself writes the checkpoint and exits.

Time until exit: the rest of the optimizer step and one checkpoint write. During validation, benchmarks and samples
only the write, because a snapshot is taken before they start.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import FrameType

from gpt2.distributed import World
from gpt2.stage.torchrun import Interrupted

SLOW_FACTOR = 10.0
"""a step is reported when it takes this multiple of the median step"""
SLOW_MIN_SECONDS = 5.0
"""shorter steps are never reported"""
MIN_STEPS = 5
"""steps needed for a median"""


class SignalWatcher:
    """Watches for signals and slow steps in a thread, from construction until `close`.

    Attributes:
        signal_number: the first signal received, or 0.
        save: what the thread calls on a signal; afterwards everything is on disk and the process exits. None while the
            weights change: the training loop then checks `signal_number` and saves.
    """

    def __init__(self, world: World, report_slow: Callable[[str], None]) -> None:
        self.world = world
        self.signal_number = 0
        self.save: Callable[[], None] | None = lambda: None
        self._report_slow = report_slow
        self._step_seconds: list[float] = []
        self._step_start: float | None = None
        self._reported = False
        self._closing = False
        self._lock = threading.Lock()
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def save_with(self, save: Callable[[], None] | None) -> None:
        """Set `save`. Does not return while the thread is saving, which ends the process."""
        with self.blocked():
            self.save = save

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Delay the thread's save during the block; waits for a save that is running."""
        with self._lock:
            yield

    @contextmanager
    def watch_step(self) -> Iterator[None]:
        """Report the block if it takes much longer than the steps before."""
        self._step_start, self._reported = time.monotonic(), False
        try:
            yield
        finally:
            self._step_seconds = [*self._step_seconds[-99:], time.monotonic() - self._step_start]
            self._step_start = None

    def close(self) -> None:
        """Stop the thread and restore the previous signal handlers."""
        self._closing = True
        os.write(self._write, b"\0")
        self._thread.join()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number

    # ------------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        while not self._closing:
            ready, _, _ = select.select([self._read], [], [], 0.5)
            for number in os.read(self._read, 64) if ready else b"":
                if number in self._old_handlers:
                    self.signal_number = self.signal_number or number
            if self.signal_number:
                self._save_and_exit(self.signal_number)
            self._check_step()

    def _save_and_exit(self, number: int) -> None:
        """Exit if everything is on disk, or can be brought there from this thread."""
        if not self.world.is_main:
            if self.world.is_published("saved") or self.world.is_published("failed"):
                os._exit(128 + number)
            return
        with self._lock:
            if self.save is None:
                if self.world.is_published("failed", if_gone=False):  # rank 0 waits for a rank that is gone
                    time.sleep(1)  # lets the main thread report its own error
                    os._exit(128 + number)
                return
            self.save()
            print(f"[rank 0] {Interrupted(number)}", file=sys.stderr, flush=True)
            self.world.publish("saved", str(number))
            os._exit(128 + number)

    def _check_step(self) -> None:
        start = self._step_start
        if start is None or self._reported or len(self._step_seconds) < MIN_STEPS:
            return
        typical, seconds = median(self._step_seconds), time.monotonic() - start
        if seconds > max(SLOW_FACTOR * typical, SLOW_MIN_SECONDS):
            self._reported = True
            self._report_slow(
                f"rank {self.world.rank}: a step is taking {seconds:.0f} s (median {typical:.2f} s): a "
                f"process may hang, or the disk or another program is slow"
            )
