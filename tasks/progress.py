"""Progress of a stage, read from the metrics.jsonl that its process writes."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from gpt2.stage.metrics import parse_line

LOG_SECONDS = 10.0
ARTIFACT_SECONDS = 5.0
TAIL_BYTES = 1 << 16


class MetricsTail:
    """The lines appended to a metrics file since the last call of `lines`.

    A file that was replaced or cut, as by a resumed training, is read again from its start.

    Args:
        last_bytes: read only this much of the end of an existing file.
    """

    def __init__(self, path: Path, last_bytes: int | None = None) -> None:
        self.path = path
        self._inode: int | None = None
        self._offset = 0
        self._last_bytes = last_bytes

    def lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                skip = max(0, stat.st_size - self._last_bytes) if self._last_bytes else 0
                self._inode, self._offset = stat.st_ino, skip
                file.seek(skip)
                self._offset += len(file.readline()) if skip else 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # incomplete
                self._offset += len(line)
                if (values := parse_line(line)) is not None:
                    yield values


class Progress:
    """Progress of one stage: units done, total, rate and the latest training loss."""

    def __init__(self, metrics: Path) -> None:
        self._tail = MetricsTail(metrics, TAIL_BYTES)
        self._recent: deque[tuple[float, float]] = deque(maxlen=50)  # (time, done)
        self.done = 0.0
        self.total = 0.0
        self.unit = ""
        self.loss: float | None = None

    def update(self) -> bool:
        """Read new lines; whether one of them holds progress."""
        updated = False
        for line in self._tail.lines():
            if line.get("total"):
                if line["done"] < self.done:
                    self._recent.clear()  # resumed at an earlier point
                self.done, self.total, self.unit = line["done"], line["total"], line.get("unit", "")
                self._recent.append((line["time"], self.done))
                updated = True
            self.loss = line.get("train/loss", self.loss)
        return updated

    @property
    def fraction(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def rate(self) -> float | None:
        """Units per second over the latest lines; None before the second."""
        if len(self._recent) < 2:
            return None
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None

    def describe(self) -> str:
        """E.g. "1,200 of 19,560 steps (6 %), 3.4 steps/s, 1 h 30 min left, loss 4.812"."""
        parts = [f"{self.done:,.0f} of {self.total:,.0f} {self.unit} ({100 * self.fraction:.0f} %)"]
        if self.rate is not None:
            parts.append(format_rate(self.rate, self.unit))
        if self.seconds_left is not None:
            parts.append(f"{format_duration(self.seconds_left)} left")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        return ", ".join(parts)


def format_rate(rate: float, unit: str) -> str:
    """3.4 steps/s, 1,204 steps/s, or 44.8 s/step."""
    if rate < 1:
        return f"{1 / rate:,.1f} s/{unit.removesuffix('s')}"
    return f"{rate:,.1f} {unit}/s" if rate < 100 else f"{rate:,.0f} {unit}/s"


def format_duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 5 h 4 min, 2 d 3 h."""
    whole = round(seconds)
    for size, name, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name} {rest} {small}" if rest else f"{whole // size} {name}"
    return f"{whole} s"


# ---------------------------------------------------------------------------------------------------------- displays


class Display(Protocol):
    """Shows the progress of a stage. `show` is called often and limits its own rate."""

    def show(self, progress: Progress) -> None: ...

    def close(self, progress: Progress, finished: bool) -> None: ...


class Watch:
    """Reads a stage's progress and shows it on several displays.

    An exception in a display does not end the stage: it is logged, and the display is removed.
    """

    def __init__(
        self, metrics: Path, displays: Iterable[Display], logger: logging.Logger | logging.LoggerAdapter[Any]
    ) -> None:
        self._progress = Progress(metrics)
        self._readable = True
        self._displays = list(displays)
        self._logger = logger

    def update(self) -> None:
        try:
            updated = self._readable and self._progress.update()
        except Exception as error:
            self._logger.warning("progress is no longer shown: %s: %s", type(error).__name__, error)
            self._readable = updated = False
        if updated:
            self._call(lambda display: display.show(self._progress))

    def close(self, finished: bool) -> None:
        self._call(lambda display: display.close(self._progress, finished))

    def _call(self, method: Callable[[Display], None]) -> None:
        for display in tuple(self._displays):
            try:
                method(display)
            except Exception as error:
                names = type(display).__name__, type(error).__name__
                self._logger.warning("progress is no longer shown by %s: %s: %s", *names, error)
                self._displays.remove(display)


class LogLines:
    """A log line per LOG_SECONDS, where stderr is not a terminal."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._logger = logger
        self._next = time.monotonic() + LOG_SECONDS

    def show(self, progress: Progress) -> None:
        if progress.total and time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_SECONDS
            self._logger.info(progress.describe())

    def close(self, progress: Progress, finished: bool) -> None:
        pass


class Bar:
    """A bar at the bottom of the terminal; log lines scroll above it."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        # Prefect's console, which log lines use: two consoles on one terminal overwrite each other.
        shared = [h.console for h in logging.getLogger("prefect").handlers if hasattr(h, "console")]
        self._console: Console = shared[0] if shared else Console(stderr=True)
        # Colours by name: Prefect's console lacks the styles of rich's bars.
        colours: Any = {"style": "bright_black", "complete_style": "green", "finished_style": "green"}
        columns = (
            TextColumn("{task.description}", style="none"),
            BarColumn(bar_width=16, pulse_style="green", **colours),
            TextColumn("{task.fields[text]}", style="none"),
        )
        self._rich = RichProgress(*columns, console=self._console, transient=True)
        self._label = label
        self._task: Any = None

    def show(self, progress: Progress) -> None:
        if not progress.total:
            return
        if self._task is None:  # no bar for a stage without progress
            self._task = self._rich.add_task(self._label, total=1.0, text="")
            self._rich.start()
        self._rich.update(self._task, completed=progress.fraction, text=progress.describe())

    def close(self, progress: Progress, finished: bool) -> None:
        if self._task is not None:
            self._rich.stop()


class Artifact:
    """A progress artifact on Prefect's page of the run. An unreachable server does not stop the stage.

    Args:
        key: lower-case letters, digits and hyphens.
    """

    def __init__(self, key: str, description: str, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._key = key
        self._description = description
        self._logger = logger
        self._id: UUID | None = None
        self._next = 0.0

    def show(self, progress: Progress) -> None:
        if progress.total and time.monotonic() >= self._next:
            self._next = time.monotonic() + ARTIFACT_SECONDS
            self._send(progress)

    def close(self, progress: Progress, finished: bool) -> None:
        if self._id is not None:
            self._send(progress, 1.0 if finished else None)

    def _send(self, progress: Progress, fraction: float | None = None) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = round(100 * (progress.fraction if fraction is None else fraction), 1)
        text = f"{self._description}: {progress.describe()}"
        try:
            if self._id is None:
                artifact: Any = create_progress_artifact(progress=percent, key=self._key, description=text)
                self._id = artifact
            else:
                update_progress_artifact(artifact_id=self._id, progress=percent, description=text)
        except Exception as error:
            self._next = time.monotonic() + 60
            self._logger.warning("progress is not shown on Prefect's page: %s", error)
