"""The download stage: the verified files of a corpus, under data/.

    python -m gpt2.download DIRECTORY

Local files are linked, not copied. A restart resumes the download.
"""

from __future__ import annotations

import time
from typing import Any

from gpt2.download.sources import fetch, known_sha256
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import DownloadFacts
from gpt2.stage.metrics import MetricsWriter


def work(stage: StageDir) -> None:
    """Fetch the source of the stage's configuration and write the manifest."""
    identity = stage.request.config["source"]
    hints = stage.request.hints.get("source", {})
    with DownloadProgress(stage.metrics()) as report:
        files = fetch(identity, hints, stage.path, workers=stage.runtime.download_workers, progress=report)
    facts = DownloadFacts(
        kind=identity["kind"],
        text_column="text" if identity["kind"] == "installed-docs" else identity.get("text_column"),
        files=tuple(files),
        total_bytes=sum((stage.path / name).stat().st_size for name in files),
        origin=origin(identity, hints),
    )
    stage.finish(files, facts, sha256=known_sha256(identity, stage.path))


def origin(identity: dict[str, Any], hints: dict[str, Any]) -> str:
    """The origin of the files, for messages and reports."""
    if identity["kind"] in ("hub", "hub-shards", "hub-model"):
        return f"{identity['repo']}@{identity['revision']}"
    if identity["kind"] == "installed-docs":
        return f"docstrings of {hints['installation']}"
    names = [name for name, _, _ in identity["files"]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"local files: {', '.join(names[:3])}{more}"


class DownloadProgress:
    """Writes progress to metrics.jsonl every second and to the terminal every five seconds."""

    METRICS_SECONDS, PRINT_SECONDS = 1.0, 5.0

    def __init__(self, metrics: MetricsWriter) -> None:
        self.metrics = metrics
        self.started: tuple[float, int] | None = None
        self.last_metrics = self.last_print = time.monotonic()

    def __call__(self, done: int, total: int, files: int) -> None:
        """Report `done` of `total` bytes and `files` complete files."""
        now = time.monotonic()
        if self.started is None:
            self.started = now, done  # the rate excludes bytes of an earlier run
        if now - self.last_metrics >= self.METRICS_SECONDS or done == total:
            self.metrics.write(files, done=done, total=total, unit="bytes")
            self.last_metrics = now
        if now - self.last_print >= self.PRINT_SECONDS:
            self.last_print = now
            seconds = now - self.started[0]
            rate = (done - self.started[1]) / seconds if seconds > 0 else 0.0
            left = f"{(total - done) / rate:,.0f} s left" if rate > 0 else "time left unknown"
            sizes = f"{done / 1e9:,.3f} of {total / 1e9:,.3f} GB"
            print(f"download: {files} files complete, {sizes}, {rate / 1e6:,.1f} MB/s, {left}", flush=True)

    def __enter__(self) -> DownloadProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
