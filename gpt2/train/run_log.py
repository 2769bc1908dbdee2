"""What a training run writes down as it goes: metrics.jsonl, samples.jsonl, anomalies.jsonl, and lines to look at.

Only rank 0 writes. After a resume, or going back to a checkpoint, lines of later steps are cut off before the steps
are taken again, so no file ever says a thing twice or leaves a step out.
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
RECORDS = (METRICS, SAMPLES, ANOMALIES)


class Records:
    """The three files of one run's directory; on other ranks than 0 every method does nothing.

    Args:
        total: optimizer steps of the whole run, for progress bars.
    """

    def __init__(self, directory: Path, total: int, *, active: bool) -> None:
        self.directory, self.total, self.active = directory, total, active
        self._metrics: MetricsWriter | None = None

    def go_back_to(self, step: int, evaluated: bool) -> None:
        """Cut off what was written after `step`; and what its evaluation gave, if that is to be done again."""
        if not self.active:
            return
        if self._metrics is not None:
            self._metrics.close()
        for name in RECORDS:
            if damaged := damaged_lines(self.directory / name):
                self.say(f"warning: {self.directory / name}: damaged lines, left out of curves and reports: {damaged}")
            keep_lines(
                self.directory / name,
                lambda line: line["step"] < step or (line["step"] == step and (evaluated or not _of_evaluation(line))),
            )
        self._metrics = MetricsWriter(self.directory / METRICS)

    def metrics(self, step: int, **metrics: float | None) -> None:
        """One line of metrics.jsonl; figures that are not there, or not finite (JSON has no NaN), are left out."""
        if self._metrics is not None:
            there = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
            self._metrics.write(step, done=step, total=self.total, unit="steps", **there)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._append(SAMPLES, {"step": step, "prompt": prompt, "text": text})

    def anomaly(self, step: int, **fields: Any) -> None:
        """One line of anomalies.jsonl.

        Args:
            step: the step after which the run goes on, so that a resume at or after it keeps the line.
        """
        self._append(ANOMALIES, {"step": step} | fields)

    def rolled_back(self, step: int) -> dict[str, int]:
        """What the latest return to the checkpoint of `step` changed in where the run stands; empty without one."""
        path = self.directory / ANOMALIES
        lines = [line for line in read_metrics(path) if line["step"] == step and line.get("action") == "rollback"]
        return {name: lines[-1][name] for name in ("passed_over", "skips")} if lines else {}

    def _append(self, name: str, fields: dict[str, Any]) -> None:
        if self.active:
            with open(self.directory / name, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3)} | fields) + "\n")

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def sync(self) -> None:
        """Bring the metrics to disk: a checkpoint must not survive a power cut that its metrics do not."""
        if self._metrics is not None:
            self._metrics.sync()

    def files(self) -> list[str]:
        """Those that exist, relative to the run's directory."""
        return [name for name in RECORDS if (self.directory / name).exists()]


def _of_evaluation(line: dict[str, Any]) -> bool:
    return "text" in line or any(name.startswith(("val/", "benchmark/")) for name in line)
