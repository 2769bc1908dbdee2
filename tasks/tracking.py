"""Keeping MLflow up to date while the stages run, from a thread of its own.

The thread reads what the stages write to the store. A tracking server that is slow or down costs them nothing; what
it missed is sent when it is back, at the latest by the next run of the same command.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any

from gpt2.errors import without_credentials
from tasks.mlflow_sync import Mirror

EVERY_SECONDS = 2.0
AT_MOST_EVERY_SECONDS = 30.0
"""between tries while the server cannot be reached"""
CLOSE_SECONDS = 60.0

logger = logging.getLogger("prefect.tracking")  # below "prefect", whose handlers show it


class Tracking:
    """`with Tracking(mirror, busy=True): ...` mirrors for as long as the block runs, and how it ended.

    Args:
        busy: whether there is work to do; otherwise what is missing is sent and the run's status stays.
    """

    def __init__(self, mirror: Mirror, *, busy: bool, close_seconds: float = CLOSE_SECONDS) -> None:
        self.mirror = mirror
        self._address = without_credentials(mirror.uri)
        self._busy = busy
        self._close_seconds = close_seconds
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._failing: Exception | None = None
        self._monitor: Any = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def __enter__(self) -> Tracking:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._closing.set()
        self._thread.join(self._close_seconds)
        if self._thread.is_alive() or self._failing is not None:
            problem = self._failing or TimeoutError(f"no answer within {self._close_seconds:.0f} s")
            logger.warning("MLflow at %s lacks part of this run: %s", self._address, remedy(problem, self._address))

    # ------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        pause = 0.0
        while not self._closing.wait(pause):
            pause = EVERY_SECONDS if self._try() else min(AT_MOST_EVERY_SECONDS, 2 * max(pause, EVERY_SECONDS))
        self._stop_monitor()
        tries = 1 if self._failing else 3  # a server that was down all along gets one more chance, no more
        for left in reversed(range(tries)):
            if self._try(self._status):
                return
            if left:
                time.sleep(EVERY_SECONDS)

    def _try(self, status: str | None = None) -> bool:
        """One round; whether it went through. An exception here must not reach anybody."""
        try:
            self.mirror.sync()
            if status is None and self._busy:
                self.mirror.set_status("RUNNING")
                self._watch_machine()
            elif status is not None:
                self.mirror.set_status(status)
        except Exception as error:
            if self._failing is None:
                logger.warning("MLflow at %s: %s; trying again later, the run goes on", self._address, _short(error))
            self._failing = error
            return False
        if self._failing is not None:
            logger.info("MLflow at %s has caught up", self._address)
        self._failing = None
        return True

    def _watch_machine(self) -> None:
        """system/*: processor, memory, disk, network, GPUs, by MLflow's own monitor. It ends when MLflow fails it once,
        and is then started again, as for another run."""
        if self._monitor is not None and self._monitor._run_id == self.mirror.run_id:
            if self._monitor._process is not None and self._monitor._process.is_alive():
                return
        else:
            self._stop_monitor()
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.mirror.run_id, resume_logging=True, tracking_uri=self.mirror.uri)
        self._monitor.start()

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()


def remedy(error: Exception, uri: str) -> str:
    """What is wrong, what to do, and what stays lost. Metrics and results are in the store; system/* are not."""
    if "sqlite3.DatabaseError" in str(error):
        file = uri.partition(":///")[2] or "its database"
        return (
            f"{file} is damaged ({_short(error)}); move it away, then the same command records this run in a new "
            "database; the runs and registered models in the damaged one are not restored by that"
        )
    return (
        f"{_short(error)}; remove the cause, then the same command sends what is in the store; "
        "system metrics that were not sent are lost"
    )


def _short(error: Exception) -> str:
    """Its first line, without the middle of a long one: how a request failed stands at the end."""
    lines = str(error).strip().splitlines()
    text = without_credentials(lines[0] if lines else type(error).__name__)
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"
