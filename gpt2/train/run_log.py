"""The files that a training run logs to: metrics.jsonl, samples.jsonl, anomalies.jsonl; and standard output.

Only rank 0 writes. After a resume or a rollback, lines of later steps are deleted before these steps are repeated, so
each file has each step once.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from gpt2.stage.manifest import METRICS
from gpt2.stage.metrics import MetricsWriter, damaged_lines, keep_lines, read_metrics

SAMPLES, ANOMALIES = "samples.jsonl", "anomalies.jsonl"
LOG_FILES = (METRICS, SAMPLES, ANOMALIES)


class RunLog:
    """Writes the log files of one run; on ranks other than 0 no method does anything.

    Args:
        total: optimizer steps of the whole run, for progress bars.
    """

    def __init__(self, directory: Path, total: int, *, active: bool) -> None:
        self.directory, self.total, self.active = directory, total, active
        self._metrics: MetricsWriter | None = None

    def truncate(self, step: int, evaluated: bool) -> None:
        """Delete the lines of steps after `step`; and of its evaluation, unless `evaluated`."""
        if not self.active:
            return
        if self._metrics is not None:
            self._metrics.close()
        for name in LOG_FILES:
            if damaged := damaged_lines(self.directory / name):
                self.print(f"warning: {self.directory / name}: {damaged} damaged lines are ignored")
            keep_lines(
                self.directory / name,
                lambda line: line["step"] < step or (line["step"] == step and (evaluated or not _is_evaluation(line))),
            )
        self._metrics = MetricsWriter(self.directory / METRICS)

    def metrics(self, step: int, **metrics: float | None) -> None:
        """Append to metrics.jsonl, without values that are None or not finite (JSON has no NaN)."""
        if self._metrics is not None:
            finite = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
            self._metrics.write(step, done=step, total=self.total, unit="steps", **finite)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def anomaly(self, step: int, *, kind: str, action: str, value: float | None, z: float | None, **more: int) -> None:
        """Append to anomalies.jsonl.

        Args:
            step: the step after which the run continues, so that a resume at or after it keeps the line.
        """
        value = value if value is not None and math.isfinite(value) else None  # JSON has no NaN
        self._append(ANOMALIES, {"step": step, "kind": kind, "action": action, "value": value, "z": z} | more)

    def last_rollback(self, step: int) -> dict[str, int]:
        """TrainState fields changed by the last rollback to `step`; empty if there was none."""
        path = self.directory / ANOMALIES
        lines = [line for line in read_metrics(path) if line["step"] == step and line.get("action") == "rollback"]
        return {name: lines[-1][name] for name in ("passed_over", "skips")} if lines else {}

    def _append(self, name: str, fields: dict[str, Any]) -> None:
        if self.active:
            with open(self.directory / name, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3)} | fields) + "\n")

    def print(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def sync(self) -> None:
        """Flush metrics.jsonl to disk, before a checkpoint: a power cut must not leave the checkpoint alone."""
        if self._metrics is not None:
            self._metrics.sync()

    def files(self) -> list[str]:
        """Names of the existing log files."""
        return [name for name in LOG_FILES if (self.directory / name).exists()]


def _is_evaluation(line: dict[str, Any]) -> bool:
    return "text" in line or any(name.startswith(("val/", "benchmark/")) for name in line)
