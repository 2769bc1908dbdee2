"""Upload of one metrics.jsonl to one MLflow run: each point once, all from one history of training.

MLflow cannot delete points. A training that resumes from a checkpoint and then computes other losses (after a rollback,
with other kernels) needs another MLflow run; `HistoryMismatch` reports that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.stage.metrics import NOT_METRICS, read_metrics
from tasks.progress import MetricsTail

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

BATCH_METRICS = 1000
"""MLflow's limit per request"""
LOSSES = ("train/loss", "val/loss")
"""metrics that identify a history; others, such as step_ms, differ each time a step is computed"""


class HistoryMismatch(Exception):
    """The file and the MLflow run have different losses at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"metrics.jsonl and the MLflow run have different losses at step {step}")
        self.step = step


class MetricsUpload:
    """Uploads a metrics file to an MLflow run, starting after the points that the run has.

    Args:
        run: as MLflow returned it just now: local records may lack the last batch.
    """

    def __init__(self, mlflow: MlflowClient, run: Run, path: Path) -> None:
        self._mlflow = mlflow
        self._run_id = run.info.run_id
        self._tail = MetricsTail(path)
        # A metric's steps are sent in order, so the last step tells which ones the run has.
        self._last_steps: dict[str, int] = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        self._losses = {
            (key, metric.step): metric.value
            for key in LOSSES
            if key in self._last_steps
            for metric in mlflow.get_metric_history(self._run_id, key)
        }

    @property
    def last_step(self) -> int:
        """The run's last step with a loss; -1 without any."""
        return max((step for _, step in self._losses), default=-1)

    def compare(self) -> bool:
        """Whether the file and the run have a loss in common.

        Raises:
            HistoryMismatch: they have different losses at a step.
        """
        common = False
        for line in read_metrics(self._tail.path):
            for key in LOSSES:
                common |= key in line and self._matches(line["step"], key, line[key])
        return common

    def send(self) -> None:
        """Send the lines that the run lacks, with their own times.

        After an exception create a new object: MLflow may or may not have stored the last batch.

        Raises:
            HistoryMismatch: the file was cut back and continues with other losses.
        """
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for line in self._tail.lines():
            step, time_ms = line["step"], int(line["time"] * 1000)
            for key, value in _metrics(line):
                if step > self._last_steps.get(key, -1):
                    batch.append(Metric(key, value, time_ms, step))
                    self._last_steps[key] = step
                    if key in LOSSES:
                        self._losses[key, step] = value
                elif key in LOSSES:
                    self._matches(step, key, value)
            if len(batch) > BATCH_METRICS - 50:
                self._send(batch)
                batch = []
        self._send(batch)

    def _send(self, batch: list[Metric]) -> None:
        if batch:
            self._mlflow.log_batch(self._run_id, metrics=batch, synchronous=True)

    def _matches(self, step: int, key: str, value: float) -> bool:
        """Whether both losses are finite, and so equal; databases may round the last digit."""
        sent = self._losses.get((key, step), math.nan)
        if not (math.isfinite(sent) and math.isfinite(value)):
            return False
        if not math.isclose(sent, value, rel_tol=1e-9):
            raise HistoryMismatch(step)
        return True


def _metrics(line: dict[str, Any]) -> Iterable[tuple[str, float]]:
    return ((k, float(v)) for k, v in line.items() if k not in NOT_METRICS and isinstance(v, int | float))
