"""Where text comes from: what a source is (its identity), and getting its files into a stage's directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.config import CorpusSource

Progress = Callable[[int, int, int], None]
"""Called with (bytes done, bytes in all, files done), at most a few times a second, from the calling thread."""


def identify(source: CorpusSource, store: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, hints) of a source.

    The identity is hashed into addresses and says what the content is, not where it lies; the hints say where.
    Both are JSON. Request.config["source"] and Request.hints["source"] hold them, and `fetch` takes them.
    """
    return source.model_dump(mode="json"), source.model_dump(mode="json")


def fetch(
    identity: dict[str, Any],
    hints: dict[str, Any],
    directory: Path,
    *,
    workers: int = 8,
    progress: Progress | None = None,
) -> list[str]:
    """Put a source's files into `directory`/data/ as NNNNN-name, whole and verified; for every kind of source.

    What an earlier, killed call finished is kept and not fetched again. Local files become symlinks.

    Args:
        identity, hints: what `identify` returned, e.g. request.config["source"] and request.hints["source"].
        directory: a stage's directory.
        workers: files downloaded at a time (runtime.download_workers).

    Returns:
        paths relative to `directory`, with forward slashes, in reading order: ["data/00000-a.parquet", ...].

    Raises:
        UserError: a file is missing, changed since planning, cannot be had, is wrong again and again, or does not fit
            on the disk.
    """
    raise NotImplementedError
