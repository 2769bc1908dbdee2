"""Where text comes from: what a source is (its identity), and getting its files into a stage's directory.

An identity says what the content is, never where it lies: local files are their names, sizes and sha256, a Hub data
set is its repository at one commit, the installed documentation is the list of what is installed. Hints say where.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpt2 import installed_docs
from gpt2.atomic import fsync_dir, write_text
from gpt2.config import CorpusSource, HubFiles, HubModel, HubShards, InstalledDocs, LocalFiles, LocalShards
from gpt2.errors import UserError
from gpt2.machine import cpu_count
from gpt2.manifest import canonical, sha256_file

Progress = Callable[[int, int, int], None]
"""Called with (bytes done, bytes in all, files done), at most a few times a second, from the calling thread."""

DATA = "data"
WEIGHT_FILES = (".safetensors", ".bin", "config.json", "manifest.json")
TEXT_FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
SHARD_FORMATS = (".bin",)
MODEL_FORMATS = (".json", ".safetensors", "pytorch_model.bin")
BENCHMARK_FORMATS = (*TEXT_FORMATS, ".yaml", ".csv", ".tokens")
"""what benchmarks are made of: texts, and for CORE the list of its tasks"""
HARNESS_FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
"""of which lm-evaluation-harness takes a task's examples"""


def identify(
    source: CorpusSource | HubModel, store: Path, text_formats: tuple[str, ...] = TEXT_FORMATS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, hints) of a source.

    Both are JSON. Request.config["source"] and Request.hints["source"] hold them, and `fetch` takes them. Local
    files are hashed here, once: the hashes are remembered in `store` by path, size and time stamp.

    Raises:
        UserError: a local file is missing, a pattern matches nothing, or a file is of no known format.
    """
    hints: dict[str, Any] = {"source": source.model_dump(mode="json")}
    if isinstance(source, LocalFiles | LocalShards):
        paths = find_local(source.paths, SHARD_FORMATS if isinstance(source, LocalShards) else text_formats)
        hashes = Hashes(store).of(paths)
        files = [[path.name, path.stat().st_size, sha256] for path, sha256 in zip(paths, hashes, strict=True)]
        identity = {name: value for name, value in source.identity().items() if name != "paths"}
        return {**identity, "files": files}, {**hints, "paths": [str(path) for path in paths]}
    if isinstance(source, InstalledDocs):
        installation = installed_docs.installation()
        return {**source.identity(), "installation": installation.sha256}, {
            **hints,
            "installation": installation.describe(),
        }
    return source.identity(), hints


def fetch(
    identity: dict[str, Any],
    hints: dict[str, Any],
    directory: Path,
    *,
    workers: int = 8,
    progress: Progress | None = None,
    text_formats: tuple[str, ...] = TEXT_FORMATS,
) -> list[str]:
    """Put a source's files into `directory`/data/ as NNNNN-name, whole and verified; for every kind of source.

    What an earlier, killed call finished is kept and not fetched again. Local files become symlinks.

    Args:
        identity, hints: what `identify` returned, e.g. request.config["source"] and request.hints["source"].
        directory: a stage's directory, `<store>/<stage>/<fingerprint>`.
        workers: files downloaded at a time (runtime.download_workers).

    Returns:
        paths relative to `directory`, with forward slashes, in reading order: ["data/00000-a.parquet", ...].

    Raises:
        UserError: a file is missing, changed since planning, cannot be had, is wrong again and again, or does not fit
            on the disk.
    """
    progress = progress or (lambda done, total, files: None)
    (directory / DATA).mkdir(parents=True, exist_ok=True)
    kind = identity["kind"]
    if kind in ("local", "local-shards"):
        return _link_local(identity, hints, directory, progress)
    if kind == "installed-docs":
        return _write_installed_docs(identity, directory, progress)
    from gpt2 import hub_download  # imports huggingface_hub, which planning needs not wait for

    sources: dict[str, type[HubFiles | HubShards | HubModel]] = {
        "hub": HubFiles,
        "hub-shards": HubShards,
        "hub-model": HubModel,
    }
    source = sources[kind].model_validate(identity)
    formats = SHARD_FORMATS if kind == "hub-shards" else text_formats
    return hub_download.download(source, formats, directory, workers=workers, progress=progress)


def known_sha256(identity: dict[str, Any], directory: Path) -> dict[str, str]:
    """sha256 of fetched files, by path relative to `directory`, as far as `fetch` verified them: what the manifest
    needs not read the files again for."""
    if identity["kind"] in ("local", "local-shards"):
        return {numbered(i, name): sha256 for i, (name, _, sha256) in enumerate(identity["files"])}
    if identity["kind"] in ("hub", "hub-shards", "hub-model"):
        from gpt2 import hub_download

        return hub_download.known_sha256(directory)
    return {}


def identify_weights(path: str, store: Path) -> str:
    """sha256 over the model files at `path`, a folder or a file: weights that change under one name are others.

    Raises:
        UserError: there is nothing.
    """
    place = Path(path).expanduser()
    files = [place] if place.is_file() else sorted(p for p in place.glob("*") if p.name.endswith(WEIGHT_FILES))
    if not files:
        raise UserError(f"train.init_from: {path} holds no model: give a checkpoint folder or a llm.c file")
    hashes = Hashes(store).of([file.resolve() for file in files])
    return hashlib.sha256(
        canonical([[file.name, sha] for file, sha in zip(files, hashes, strict=True)]).encode()
    ).hexdigest()


def numbered(index: int, name: str) -> str:
    """Path of the index-th file in a stage's directory; the number keeps the reading order.

    Raises:
        UserError: the name, which a request.json may hold, is a path.
    """
    if "/" in name:
        raise UserError(f"{name[:100]!r} is a path, not the name of a file")
    return f"{DATA}/{index:05d}-{name}"


# ------------------------------------------------------------------------------------------------------ local files


def find_local(patterns: Iterable[str], formats: tuple[str, ...]) -> list[Path]:
    """The files that paths and glob patterns name, absolute: patterns in the given order, sorted within each.

    Raises:
        UserError: no such file, no match, a folder, a URL, or a suffix that is not among `formats`.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(f"{pattern} is a URL, not a path: copy the file here, or use a source of kind hub")
        path = Path(pattern).expanduser().absolute()
        if path.is_dir():
            raise UserError(f"{path} is a folder: write {pattern.rstrip('/')}/*{formats[0]}")
        matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            if not glob.has_magic(pattern):
                raise UserError(f"there is no file {path}: correct the path {pattern!r}")
            folder = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
            state = "has no file that fits" if folder.is_dir() else "does not exist"
            raise UserError(f"nothing matches {pattern!r}: the folder {folder} {state}")
        for match in matches:
            check_format(match.name, formats)
            found[match] = None
    return list(found)


def check_format(name: str, formats: tuple[str, ...]) -> None:
    """Raise a UserError unless `name` ends as one of `formats`."""
    if not name.lower().endswith(formats):
        raise UserError(f"{name} is of no known format: this source takes {', '.join(formats)}")


class Hashes:
    """sha256 of local files, remembered in `<store>/hashes.json` by path, size and time stamp."""

    RACY_NS = 2_000_000_000
    """a file changed this short a time ago may change again within the same time stamp, so it is not remembered"""

    def __init__(self, store: Path) -> None:
        self.path = store / "hashes.json"

    def of(self, paths: list[Path]) -> list[str]:
        """Hash `paths`, several at a time; those known already are not read.

        Raises:
            UserError: a file cannot be read or is being written.
        """
        known = self._read()
        with ThreadPoolExecutor(min(8, cpu_count())) as pool:  # hashlib lets go of the interpreter lock
            entries = list(pool.map(lambda path: self._entry(path, known.get(str(path))), paths))
        settled = time.time_ns() - self.RACY_NS
        new = {
            str(path): entry
            for path, entry in zip(paths, entries, strict=True)
            if entry["mtime_ns"] < settled and known.get(str(path)) != entry
        }
        if new:
            write_text(self.path, json.dumps(self._read() | new, indent=1, sort_keys=True) + "\n")
        return [entry["sha256"] for entry in entries]

    def _entry(self, path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
        try:
            before = path.stat()
            stamp = {"size": before.st_size, "mtime_ns": before.st_mtime_ns}
            if known is not None and known.items() >= stamp.items():
                return known
            sha256 = sha256_file(path)
            after = path.stat()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(f"{path} is being written ({before.st_size:,} bytes, then {after.st_size:,}): wait for it")
        return {**stamp, "sha256": sha256}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}  # losing what is remembered costs a second reading, nothing else
        return known if isinstance(known, dict) else {}


def _link_local(identity: dict[str, Any], hints: dict[str, Any], directory: Path, progress: Progress) -> list[str]:
    paths = [Path(path) for path in hints["paths"]]
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no file {path} any more: put it back, or correct the source's paths")
    store = directory.parent.parent
    linked = []
    for index, (path, sha256) in enumerate(zip(paths, Hashes(store).of(paths), strict=True)):
        name, size, planned = identity["files"][index]
        if sha256 != planned:
            raise UserError(
                f"{path} changed since the run was planned: sha256 {planned} of {size:,} bytes then, "
                f"{sha256} of {path.stat().st_size:,} bytes now; run again, it is planned anew"
            )
        linked.append(numbered(index, name))
        _symlink(path.resolve(), directory / linked[-1])
    fsync_dir(directory / DATA)
    total = sum(size for _, size, _ in identity["files"])
    progress(total, total, len(linked))
    return linked


def _symlink(target: Path, link: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


# ----------------------------------------------------------------------------------------------- installed documents


def _write_installed_docs(identity: dict[str, Any], directory: Path, progress: Progress) -> list[str]:
    now = installed_docs.installation().sha256
    if now != identity["installation"]:
        raise UserError(
            f"what is installed changed since the run was planned ({identity['installation'][:12]} then, {now[:12]} "
            "now): run again, it is planned anew"
        )
    relative = numbered(0, "installed-docs.parquet")
    size = installed_docs.write(directory / relative, max_bytes=identity["max_bytes"])
    progress(size, size, 1)
    return [relative]
