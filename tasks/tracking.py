"""A thread that keeps MLflow up to date while the stages run.

It reads what the stages write to the store. A slow or unreachable tracking server does not delay them: the thread
retries, and the next run of the same command sends what is missing.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any

from gpt2.errors import without_credentials
from tasks.mlflow_sync import MlflowRunSync

SYNC_SECONDS = 2.0
MAX_RETRY_SECONDS = 30.0
"""between attempts while the server is unreachable"""
CLOSE_SECONDS = 60.0

logger = logging.getLogger("prefect.tracking")  # below "prefect", whose handlers show it


class Tracking:
    """`with Tracking(mlflow_run, busy=True): ...` syncs the run until the block ends, then sets its final status.

    Args:
        busy: the stages have work to do; otherwise the run's status is not set to RUNNING.
    """

    def __init__(self, mlflow_run: MlflowRunSync, *, busy: bool, close_seconds: float = CLOSE_SECONDS) -> None:
        self.mlflow_run = mlflow_run
        self._address = without_credentials(mlflow_run.uri)
        self._busy = busy
        self._close_seconds = close_seconds
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._error: Exception | None = None
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
        if self._thread.is_alive() or self._error is not None:
            problem = self._error or TimeoutError(f"no answer within {self._close_seconds:.0f} s")
            logger.warning(
                "MLflow at %s lacks part of this run: %s", self._address, describe_error(problem, self._address)
            )

    # ------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        pause = 0.0
        while not self._closing.wait(pause):
            pause = SYNC_SECONDS if self._try() else min(MAX_RETRY_SECONDS, 2 * max(pause, SYNC_SECONDS))
        self._stop_system_metrics()
        attempts = 1 if self._error else 3
        for remaining in reversed(range(attempts)):
            if self._try(self._status):
                return
            if remaining:
                time.sleep(SYNC_SECONDS)

    def _try(self, status: str | None = None) -> bool:
        """Sync once; whether it succeeded. No exception leaves this method."""
        try:
            self.mlflow_run.sync()
            if status is None and self._busy:
                self.mlflow_run.set_status("RUNNING")
                self._start_system_metrics()
            elif status is not None:
                self.mlflow_run.set_status(status)
        except Exception as error:
            if self._error is None:
                logger.warning("MLflow at %s: %s; retrying later, the run continues", self._address, _short(error))
            self._error = error
            return False
        if self._error is not None:
            logger.info("MLflow at %s has caught up", self._address)
        self._error = None
        return True

    def _start_system_metrics(self) -> None:
        """Start MLflow's monitor of CPU, memory, disk, network and GPUs (system/*); restart it after an error."""
        if self._monitor is not None and self._monitor._run_id == self.mlflow_run.run_id:
            if self._monitor._process is not None and self._monitor._process.is_alive():
                return
        else:
            self._stop_system_metrics()
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(
            self.mlflow_run.run_id, resume_logging=True, tracking_uri=self.mlflow_run.uri
        )
        self._monitor.start()

    def _stop_system_metrics(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()


def describe_error(error: Exception, uri: str) -> str:
    """The error, what to do, and what is lost: only system/* metrics are not in the store."""
    if "sqlite3.DatabaseError" in str(error):
        file = uri.partition(":///")[2] or "its database"
        return (
            f"{file} is corrupt ({_short(error)}); move it away and run the same command again, which records this "
            "run in a new database; other runs and registered models are not restored"
        )
    return (
        f"{_short(error)}; remove the cause and run the same command again, which sends what is missing; "
        "unsent system metrics are lost"
    )


def _short(error: Exception) -> str:
    """Its first line, shortened in the middle: the reason of a failed request is at its end."""
    lines = str(error).strip().splitlines()
    text = without_credentials(lines[0] if lines else type(error).__name__)
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"
