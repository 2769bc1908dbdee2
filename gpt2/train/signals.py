"""Ending in good order: SIGTERM and SIGINT save first, and a step that hangs is reported.

Python runs signal handlers in the main thread, between two of its instructions; while that thread waits inside a
collective or a long kernel nothing would happen. So a thread of our own reads the signals (the kernel's side of it
writes to a pipe at once) and, where all that has to be saved is at hand already, saves it itself.

How long saving takes: the rest of the optimizer step under way, then writing one checkpoint; during validation,
benchmarks and samples only the latter, because a snapshot was taken before they began.
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

SLOW = 10.0
"""times its usual time that a step may take before it is reported"""
SLOW_AT_LEAST = 5.0
"""seconds; shorter steps are not worth a word"""
ENOUGH = 5
"""steps that make a usual time"""


class Interruption:
    """Watches for signals and slow steps from its own thread, from construction until `close`.

    `safe` says what to do on a signal: a function that makes everything saved, after which the process may end at any
    moment; or None while the weights are changing, when the loop itself has to see `requested` and save.
    """

    def __init__(self, world: World, report_slow: Callable[[str], None]) -> None:
        self.world = world
        self.requested: int | None = None
        self.safe: Callable[[], None] | None = lambda: None
        self._report_slow = report_slow
        self._durations: list[float] = []
        self._began: float | None = None
        self._reported = False
        self._closing = False
        self._lock = threading.Lock()
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._thread = threading.Thread(target=self._watch, name="interruption", daemon=True)
        self._thread.start()

    def saving_with(self, save: Callable[[], None] | None) -> None:
        """Set `safe`; waits while a save is running, which then ends the process."""
        with self.waiting():
            self.safe = save

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Signals wait inside, for what must not happen beside a save; as `saving_with`, waits for one."""
        with self._lock:
            yield

    def step_begins(self) -> None:
        self._began, self._reported = time.monotonic(), False

    def step_ends(self) -> None:
        """The step is over; what follows until the next one begins is not timed."""
        if self._began is not None:
            self._durations = [*self._durations[-99:], time.monotonic() - self._began]
        self._began = None

    def close(self) -> None:
        """Give the signals back."""
        self._closing = True
        os.write(self._write, b"\0")
        self._thread.join()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or number

    # ------------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        while not self._closing:
            ready, _, _ = select.select([self._read], [], [], 0.5)
            for number in os.read(self._read, 64) if ready else b"":
                if number in self._old:
                    self.requested = self.requested or number
            if self.requested is not None:
                self._end_if_safe(self.requested)
            self._look_at_step()

    def _end_if_safe(self, number: int) -> None:
        if not self.world.is_main:
            if self.world.is_published("saved") or self.world.is_published("failed"):
                os._exit(128 + number)
            return
        with self._lock:
            if self.safe is None:
                if self.world.is_published("failed", if_gone=False):  # nobody answers what rank 0 waits for
                    time.sleep(1)  # for a last word of its own
                    os._exit(128 + number)
                return
            self.safe()
            print(f"[rank 0] {Interrupted(number)}", file=sys.stderr, flush=True)
            self.world.publish("saved", str(number))
            os._exit(128 + number)

    def _look_at_step(self) -> None:
        began = self._began
        if began is None or self._reported or len(self._durations) < ENOUGH:
            return
        usual, now = median(self._durations), time.monotonic() - began
        if now > max(SLOW * usual, SLOW_AT_LEAST):
            self._reported = True
            self._report_slow(
                f"rank {self.world.rank}: a step is taking {now:.0f} s, {usual:.2f} s is usual; "
                f"a process may hang, or the disk or another program is slow"
            )
