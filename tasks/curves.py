"""The curves of one metrics.jsonl in one MLflow run: each point once, all of one course of training.

MLflow cannot delete points. A training that goes back to a checkpoint and computes other losses from there on (a
rollback, an older checkpoint, other kernels) therefore needs another MLflow run; `Departed` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.stage.metrics import NOT_METRICS, read_metrics
from tasks.progress import Tail

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

BATCH = 1000
"""metrics per request: MLflow's own limit"""
LOSSES = ("train/loss", "val/loss")
"""the metrics that identify a course; others, such as step_ms, differ each time a step is computed"""


class Departed(Exception):
    """The file holds another loss than the run at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"metrics.jsonl departs from the MLflow run at step {step}")
        self.step = step


class Curves:
    """What an MLflow run holds of a metrics file, as MLflow itself says.

    Args:
        run: as MLflow returned it just now: notes of earlier sessions may lack the last batch that was sent.
    """

    def __init__(self, mlflow: MlflowClient, run: Run, path: Path) -> None:
        self._mlflow = mlflow
        self._run_id = run.info.run_id
        self._tail = Tail(path)
        # The steps of one metric are sent in order, so the last one says which are there.
        self.last: dict[str, int] = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        self._losses = {
            (key, metric.step): metric.value
            for key in LOSSES
            if key in self.last
            for metric in mlflow.get_metric_history(self._run_id, key)
        }

    @property
    def last_step(self) -> int:
        """The last step that has a loss; -1 without any."""
        return max((step for _, step in self._losses), default=-1)

    def compare(self) -> bool:
        """Whether the file and the run have a loss in common.

        Raises:
            Departed: at some step they have different ones.
        """
        common = False
        for line in read_metrics(self._tail.path):
            for key in LOSSES:
                common |= key in line and self._same(line["step"], key, line[key])
        return common

    def send(self) -> None:
        """Send the lines that MLflow does not have, under their own times.

        After an exception make a new object: whether the last batch arrived is for MLflow to say.

        Raises:
            Departed: the file was cut back and goes on with other losses.
        """
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for line in self._tail.lines():
            step, time_ms = line["step"], int(line["time"] * 1000)
            for key, value in _metrics(line):
                if step > self.last.get(key, -1):
                    batch.append(Metric(key, value, time_ms, step))
                    self.last[key] = step
                    if key in LOSSES:
                        self._losses[key, step] = value
                elif key in LOSSES:
                    self._same(step, key, value)
            if len(batch) > BATCH - 50:
                self._send(batch)
                batch = []
        self._send(batch)

    def _send(self, batch: list[Metric]) -> None:
        if batch:
            self._mlflow.log_batch(self._run_id, metrics=batch, synchronous=True)

    def _same(self, step: int, key: str, value: float) -> bool:
        """Whether the run has a finite loss there; it is the same then. Databases may round a number's last digit."""
        there = self._losses.get((key, step), math.nan)
        if not (math.isfinite(there) and math.isfinite(value)):
            return False
        if not math.isclose(there, value, rel_tol=1e-9):
            raise Departed(step)
        return True


def _metrics(line: dict[str, Any]) -> Iterable[tuple[str, float]]:
    return ((k, float(v)) for k, v in line.items() if k not in NOT_METRICS and isinstance(v, int | float))


def damaged_line(path: Path) -> str:
    """Which line is the first that is not JSON, and why."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError as error:
            return f"line {number}: {error}"
    return "no line: all are JSON again"
