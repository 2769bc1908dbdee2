"""Where text comes from: what a source is (its identity), and getting its files into a stage's directory.

An identity says what the content is, never where it lies: local files are their names, sizes and sha256, a Hub data
set is its repository at one commit, the installed documentation is the source files that hold it. Hints say where.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpt2.architecture import resolve
from gpt2.atomic import fsync_dir
from gpt2.config.sources import CorpusSource, HubFiles, HubModel, HubShards, InstalledDocs, LocalFiles, LocalShards
from gpt2.download import installed_docs
from gpt2.errors import UserError
from gpt2.stage.file_hashes import Hashes
from gpt2.stage.manifest import canonical

ProgressCallback = Callable[[int, int, int], None]
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
    source: CorpusSource | HubModel,
    store: Path,
    text_formats: tuple[str, ...] = TEXT_FORMATS,
    *,
    verify: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, hints) of a source.

    Both are JSON. Request.config["source"] and Request.hints["source"] hold them, and `fetch` takes them. Local
    files are hashed here, once: the hashes are remembered in `store` by path, size, mtime, ctime and inode. `verify`
    hashes them in any case.

    Raises:
        UserError: a local file is missing, a pattern matches nothing, or a file is of no known format.
    """
    hints: dict[str, Any] = {"source": source.model_dump(mode="json")}
    if isinstance(source, LocalFiles | LocalShards):
        paths = find_local(source.paths, SHARD_FORMATS if isinstance(source, LocalShards) else text_formats)
        hashes = Hashes(store, verify=verify).of(paths)
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
    progress: ProgressCallback | None = None,
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
    from gpt2.download import hub_download  # imports huggingface_hub, which planning needs not wait for

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
    needs not read the files again for. Called when the stage has read them.

    Raises:
        UserError: a local file changed since it was fetched.
    """
    if identity["kind"] in ("local", "local-shards"):
        linked = [numbered_path(index, name) for index, (name, _, _) in enumerate(identity["files"])]
        return dict(zip(linked, _check_local(identity, [directory / name for name in linked], directory), strict=True))
    if identity["kind"] in ("hub", "hub-shards", "hub-model"):
        from gpt2.download import hub_download

        return hub_download.known_sha256(directory)
    return {}


def weight_files(path: str) -> list[Path]:
    """The files of the model at `path`, a folder, a file or a finished stage.

    Raises:
        UserError: there is none.
    """
    place = resolve(Path(path).expanduser())
    if place.is_file():
        return [place]
    return sorted(file for file in place.iterdir() if file.name.endswith(WEIGHT_FILES))


def weights_sha256(files: Iterable[Path], hashes: Iterable[str]) -> str:
    """One sha256 for several files with these hashes: weights that change under one name are others."""
    named = [[file.name, sha256] for file, sha256 in zip(files, hashes, strict=True)]
    return hashlib.sha256(canonical(named).encode()).hexdigest()


def identify_weights(path: str, store: Path, *, verify: bool = False) -> str:
    """sha256 over the model files at `path`; see `weight_files` and `identify`.

    Raises:
        UserError: there are none.
    """
    files = weight_files(path)
    return weights_sha256(files, Hashes(store, verify=verify).of(files))


def numbered_path(index: int, name: str) -> str:
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


def _link_local(
    identity: dict[str, Any], hints: dict[str, Any], directory: Path, progress: ProgressCallback
) -> list[str]:
    paths = [Path(path) for path in hints["paths"]]
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no file {path} any more: put it back, or correct the source's paths")
    _check_local(identity, paths, directory)
    linked = []
    for index, (path, (name, _, _)) in enumerate(zip(paths, identity["files"], strict=True)):
        linked.append(numbered_path(index, name))
        _symlink(path.resolve(), directory / linked[-1])
    fsync_dir(directory / DATA)
    total = sum(size for _, size, _ in identity["files"])
    progress(total, total, len(linked))
    return linked


def _check_local(identity: dict[str, Any], paths: list[Path], directory: Path) -> list[str]:
    """The sha256 of `paths`, which are the planned ones.

    Raises:
        UserError: a file changed since the run was planned.
    """
    found = Hashes(directory.parent.parent).of(paths)
    for path, now, (_, size, planned) in zip(paths, found, identity["files"], strict=True):
        if now != planned:
            raise UserError(
                f"{path.resolve()} changed since the run was planned: sha256 {planned} of {size:,} bytes then, "
                f"{now} of {path.stat().st_size:,} bytes now; run again, it is planned anew"
            )
    return found


def _symlink(target: Path, link: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


# ----------------------------------------------------------------------------------------------- installed documents


def _write_installed_docs(identity: dict[str, Any], directory: Path, progress: ProgressCallback) -> list[str]:
    now = installed_docs.installation().sha256
    if now != identity["installation"]:
        raise UserError(
            f"mlflow or prefect changed since the run was planned (sha256 {identity['installation'][:12]} then, "
            f"{now[:12]} now): run the command again"
        )
    relative = numbered_path(0, "installed-docs.parquet")
    size = installed_docs.write(directory / relative, max_bytes=identity["max_bytes"])
    progress(size, size, 1)
    return [relative]
