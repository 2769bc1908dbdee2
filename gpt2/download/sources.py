"""Sources of files: their identity, and fetching them into a stage's directory.

An identity describes content, not location: names, sizes and sha256 of local files; repository and commit on the Hub;
the source files that hold the installed documentation. Hints describe the location and are not hashed.
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
"""Called with (bytes done, bytes in total, files done), at most a few times per second, from the calling thread."""

DATA = "data"
WEIGHT_FILES = (".safetensors", ".bin", "config.json", "manifest.json")
TEXT_FORMATS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
SHARD_FORMATS = (".bin",)
MODEL_FORMATS = (".json", ".safetensors", "pytorch_model.bin")
BENCHMARK_FORMATS = (*TEXT_FORMATS, ".yaml", ".csv", ".tokens")
"""texts, and for CORE the list of its tasks"""
HARNESS_FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
"""formats of examples that lm-evaluation-harness reads"""


def identify(
    source: CorpusSource | HubModel,
    store: Path,
    text_formats: tuple[str, ...] = TEXT_FORMATS,
    *,
    verify: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, hints) of a source.

    Both are JSON, stored as Request.config["source"] and Request.hints["source"] and passed to `fetch`. Hashes of local
    files are cached in `store` by path, size, mtime, ctime and inode; `verify` hashes them again.

    Raises:
        UserError: a local file is missing, a pattern matches nothing, or a file has no known suffix.
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
    """Put a source's files into `directory`/data/ as NNNNN-name, complete and verified.

    Files of an earlier, killed call are kept. Local files become symlinks.

    Args:
        identity, hints: the result of `identify`, e.g. request.config["source"] and request.hints["source"].
        directory: a stage's directory, `<store>/<stage>/<fingerprint>`.
        workers: files downloaded at a time (runtime.download_workers).

    Returns:
        POSIX paths relative to `directory`, in reading order: ["data/00000-a.parquet", ...].

    Raises:
        UserError: a file is missing, has changed since planning, cannot be downloaded, or does not fit on the disk.
    """
    progress = progress or (lambda done, total, files: None)
    (directory / DATA).mkdir(parents=True, exist_ok=True)
    kind = identity["kind"]
    if kind in ("local", "local-shards"):
        return _link_local(identity, hints, directory, progress)
    if kind == "installed-docs":
        return _write_installed_docs(identity, directory, progress)
    from gpt2.download import hub_download  # lazy: importing huggingface_hub would slow down planning

    sources: dict[str, type[HubFiles | HubShards | HubModel]] = {
        "hub": HubFiles,
        "hub-shards": HubShards,
        "hub-model": HubModel,
    }
    source = sources[kind].model_validate(identity)
    formats = SHARD_FORMATS if kind == "hub-shards" else text_formats
    return hub_download.download(source, formats, directory, workers=workers, progress=progress)


def known_sha256(identity: dict[str, Any], directory: Path) -> dict[str, str]:
    """The sha256 of fetched files that `fetch` verified, by path relative to `directory`, so that the manifest does
    not read them again. Call it after the stage has read the files.

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
        UserError: there is no model.
    """
    model = resolve(Path(path).expanduser())
    if model.is_file():
        return [model]
    return sorted(file for file in model.iterdir() if file.name.endswith(WEIGHT_FILES))


def weights_sha256(files: Iterable[Path], hashes: Iterable[str]) -> str:
    """One sha256 over the names and hashes of weight files."""
    named = [[file.name, sha256] for file, sha256 in zip(files, hashes, strict=True)]
    return hashlib.sha256(canonical(named).encode()).hexdigest()


def identify_weights(path: str, store: Path, *, verify: bool = False) -> str:
    """sha256 over the model files at `path`; see `weight_files` and `identify`.

    Raises:
        UserError: there is no model.
    """
    files = weight_files(path)
    return weights_sha256(files, Hashes(store, verify=verify).of(files))


def numbered_path(index: int, name: str) -> str:
    """Path of file number `index` in a stage's directory; names sort in reading order.

    Raises:
        UserError: `name`, which may come from a request.json, is a path.
    """
    if "/" in name:
        raise UserError(f"{name[:100]!r} is a path, not the name of a file")
    return f"{DATA}/{index:05d}-{name}"


# ------------------------------------------------------------------------------------------------------ local files


def find_local(patterns: Iterable[str], formats: tuple[str, ...]) -> list[Path]:
    """Absolute paths of the files that paths and glob patterns match: in the order of the patterns, sorted within each.

    Raises:
        UserError: no such file, no match, a folder, a URL, or a suffix that is not among `formats`.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(f"{pattern} is a URL, not a path: download the file, or use a source of kind hub")
        path = Path(pattern).expanduser().absolute()
        if path.is_dir():
            raise UserError(f"{path} is a folder: write {pattern.rstrip('/')}/*{formats[0]}")
        matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            if not glob.has_magic(pattern):
                raise UserError(f"there is no file {path}: correct the path {pattern!r}")
            folder = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
            state = "has no match" if folder.is_dir() else "does not exist"
            raise UserError(f"nothing matches {pattern!r}: the folder {folder} {state}")
        for match in matches:
            check_format(match.name, formats)
            files[match] = None
    return list(files)


def check_format(name: str, formats: tuple[str, ...]) -> None:
    """Raise a UserError unless `name` ends with one of `formats`."""
    if not name.lower().endswith(formats):
        raise UserError(f"{name} has no known suffix: this source accepts {', '.join(formats)}")


def _link_local(
    identity: dict[str, Any], hints: dict[str, Any], directory: Path, progress: ProgressCallback
) -> list[str]:
    paths = [Path(path) for path in hints["paths"]]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} no longer exists: restore it, or correct the source's paths")
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
    """The sha256 of `paths`, equal to the planned ones.

    Raises:
        UserError: a file changed since the run was planned.
    """
    hashes = Hashes(directory.parent.parent).of(paths)
    for path, actual, (_, size, planned) in zip(paths, hashes, identity["files"], strict=True):
        if actual != planned:
            raise UserError(
                f"{path.resolve()} changed since the run was planned: sha256 {planned} of {size:,} bytes then, "
                f"{actual} of {path.stat().st_size:,} bytes now; run again to plan with the new file"
            )
    return hashes


def _symlink(target: Path, link: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


# ----------------------------------------------------------------------------------------------- installed documents


def _write_installed_docs(identity: dict[str, Any], directory: Path, progress: ProgressCallback) -> list[str]:
    actual = installed_docs.installation().sha256
    if actual != identity["installation"]:
        raise UserError(
            f"mlflow or prefect changed since the run was planned (sha256 {identity['installation'][:12]} then, "
            f"{actual[:12]} now): run the command again"
        )
    relative = numbered_path(0, "installed-docs.parquet")
    size = installed_docs.write(directory / relative, max_bytes=identity["max_bytes"])
    progress(size, size, 1)
    return [relative]
