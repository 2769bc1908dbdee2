"""metrics.jsonl: one JSON object a line, the source of every curve and of every progress bar.

Each line has `time` (Unix seconds, written once, so that a replay elsewhere is recognised) and `step` (an optimizer
step for training, a unit of work elsewhere); every other number is a metric under its own name, "/" grouping them as
MLflow's pages do. `done`, `total` and `unit` are for progress bars and are no metrics.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2.atomic import atomic_write

NOT_METRICS = frozenset({"time", "step", "done", "total", "unit"})


class MetricsWriter:
    """Appends lines to `path`; each line reaches the operating system before `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the stage

    def write(
        self, step: int, *, done: float | None = None, total: float | None = None, unit: str = "", **metrics: Any
    ) -> None:
        """Append one line. Metric names with "/" are given as `**{"val/loss": 3.2}`."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "step": step}
        if done is not None:
            line |= {"done": done, "total": total, "unit": unit}
        self._file.write(json.dumps(line | metrics) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One line; None where it is damaged (no JSON object, no time or step) or not complete yet."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:  # of JSON and of UTF-8
        return None
    numbers = isinstance(found, dict) and (found.get("time"), found.get("step"))
    return found if numbers and all(isinstance(number, int | float) for number in numbers) else None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; damaged ones and a last line that is still being written are left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        yield from (found for line in file if (found := parse_line(line)) is not None)


def damaged_lines(path: Path) -> int:
    """Number of complete lines that `read_metrics` leaves out."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return sum(line.endswith(b"\n") and parse_line(line) is None for line in file)


def cut_torn_line(path: Path) -> None:
    """Drop a last line that a kill left without its end, so that the next append starts on a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)


def cut_after_step(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: what a resumed run writes again must not stand there twice."""
    keep_lines(path, lambda line: line["step"] <= step)


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines that are not wanted, all at once or not at all, and a torn last one."""
    if not path.exists():
        return
    cut_torn_line(path)
    lines = list(read_metrics(path))
    kept = [json.dumps(line) + "\n" for line in lines if wanted(line)]
    if len(kept) < len(lines):
        with atomic_write(path, "w") as file:
            file.writelines(kept)
