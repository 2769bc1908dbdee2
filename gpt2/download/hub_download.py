"""Downloads the files of a Hub repository: several at a time, resumed at the byte where they stopped, and verified.

Bytes are appended to data/.NNNNN-name.part, which is renamed when its hash equals the Hub's. So a file under its final
name is complete, whenever the process is killed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants

from gpt2.atomic import fsync_dir
from gpt2.config.sources import HubFiles, HubModel, HubShards
from gpt2.download.hub import HTTPError, HubFile, HubListing, HubRepo
from gpt2.download.retries import DEFAULT_POLICY, Retrier, RetryPolicy
from gpt2.errors import UserError
from gpt2.stage.manifest import read_model, write_model

LISTING = "listing.json"
MAX_WRONG_HASHES = 3  # complete downloads of one file with a wrong hash


def download(
    source: HubFiles | HubShards | HubModel,
    formats: tuple[str, ...],
    directory: Path,
    *,
    workers: int,
    progress: Callable[[int, int, int], None],
    retry_policy: RetryPolicy = DEFAULT_POLICY,
) -> list[str]:
    """Download a source's files into `directory`/data/. Called by gpt2.download.sources.fetch.

    Args:
        formats: suffixes that its files may have.
        progress: see sources.ProgressCallback.

    Raises:
        UserError: not found, no access, no network, no space, or MAX_WRONG_HASHES wrong hashes.
    """
    if constants.is_offline_mode():
        raise UserError(
            f"HF_HUB_OFFLINE is set, so {source.repo} cannot be downloaded: unset it, or use a source of kind local"
        )
    (directory / "data").mkdir(parents=True, exist_ok=True)
    listing_path = directory / LISTING
    if not listing_path.exists():
        hub = HubRepo(
            source.repo, source.revision, retry_policy, "models" if isinstance(source, HubModel) else "datasets"
        )
        write_model(listing_path, hub.listing(source.files, formats))
    return _Download(read_model(listing_path, HubListing), directory, workers, retry_policy).run(progress)


def known_sha256(directory: Path) -> dict[str, str]:
    """The sha256 that downloads were verified against, by path relative to `directory`."""
    listing = read_model(directory / LISTING, HubListing)
    return {relative(index, file): file.sha256 for index, file in enumerate(listing.files) if file.sha256 is not None}


def relative(index: int, file: HubFile) -> str:
    return f"data/{index:05d}-{PurePosixPath(file.path).name}"


class _Cancelled(Exception):
    """Another file failed; this one keeps its part."""


class _Download:
    """Downloads the files of one listing with several threads."""

    def __init__(self, listing: HubListing, directory: Path, workers: int, retry_policy: RetryPolicy) -> None:
        self.listing = listing
        self.directory = directory
        self.workers = workers
        self.hub = HubRepo(listing.repo, listing.revision, retry_policy, listing.kind)
        self.retry_policy = retry_policy
        self.stop = threading.Event()
        self.received = [0] * len(listing.files)  # bytes on disk per file; written by the file's thread only

    def run(self, progress: Callable[[int, int, int], None]) -> list[str]:
        files = self.listing.files
        targets = [self.directory / relative(index, file) for index, file in enumerate(files)]
        missing = []
        for index, (file, target) in enumerate(zip(files, targets, strict=True)):
            complete = target.exists() and target.stat().st_size == file.size
            part = _part(target)
            self.received[index] = file.size if complete else part.stat().st_size if part.exists() else 0
            if not complete:
                missing.append(index)
        total = sum(file.size for file in files)
        self._check_space(total)
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            running = {pool.submit(self._fetch, index, files[index], targets[index]) for index in missing}
            try:
                while running:
                    done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    progress(sum(self.received), total, len(files) - len(running))
            except BaseException:
                self.stop.set()
                for future in running:
                    future.cancel()
                raise
        progress(total, total, len(files))
        return [relative(index, file) for index, file in enumerate(files)]

    def _check_space(self, total: int) -> None:
        need = total - sum(self.received)
        free = shutil.disk_usage(self.directory).free
        name = f"{self.listing.repo}@{self.listing.revision[:12]}"
        print(
            f"download: {len(self.listing.files)} files, {total / 1e9:,.3f} GB, of {name}; {need / 1e9:,.3f} GB to go, "
            f"{free / 1e9:,.1f} GB free at {self.directory}",
            flush=True,
        )
        if need > free:
            raise UserError(
                f"{name} needs {need / 1e9:,.1f} GB more, {free / 1e9:,.1f} GB are free at {self.directory}: "
                "free space, set runtime.store to a larger disk, or select fewer files"
            )

    def _fetch(self, index: int, file: HubFile, target: Path) -> None:
        try:
            for _ in range(MAX_WRONG_HASHES):
                actual = self._receive(index, file, _part(target))
                if actual == file.expected:
                    _part(target).replace(target)
                    fsync_dir(target.parent)
                    return
                _part(target).unlink()
                kind = "sha256" if file.sha256 else "git blob sha1"
                print(
                    f"download: {file.path} has {kind} {actual}, not {file.expected}; downloading it again", flush=True
                )
            raise UserError(
                f"{file.path} of {self.listing.repo}: received {kind} {actual}, the Hub lists {file.expected}, "
                f"{MAX_WRONG_HASHES} times in a row; a proxy or mirror changes it: check HF_ENDPOINT"
            )
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(f"no space left for {target}: free some and run again, the download resumes") from error
            raise

    def _receive(self, index: int, file: HubFile, part: Path) -> str:
        """Append to `part` up to the file's size; returns the hash of its content."""
        retries = Retrier(f"download {file.path} of {self.listing.repo}", self.retry_policy, self.stop)
        with open(part, "ab") as out:
            have = min(out.tell(), file.size)
            out.truncate(have)
            digest = _hash_of(part, file)
            furthest = have
            while have < file.size:
                try:
                    for offset, chunk in self.hub.stream(file, have):
                        if self.stop.is_set():
                            raise _Cancelled
                        if offset != have:  # the server restarts the file
                            out.truncate(offset)
                            digest = _hash_of(part, file)
                            have = offset
                        chunk = chunk[: file.size - have]
                        out.write(chunk)
                        digest.update(chunk)
                        have += len(chunk)
                        self.received[index] = have
                        if have > furthest:  # only new bytes: a server may repeat the first ones forever
                            furthest = have
                            retries.progressed()
                        if have == file.size:
                            break
                    else:
                        raise HTTPError(f"the connection ended at byte {have:,} of {file.size:,}")
                except HTTPError as error:
                    out.flush()
                    retries.failed(error, self.hub.explain(error))
                    if self.stop.is_set():
                        raise _Cancelled from error
            out.flush()
            os.fsync(out.fileno())
        return str(digest.hexdigest())


def _hash_of(part: Path, file: HubFile) -> Any:
    with open(part, "rb") as content:
        return hashlib.file_digest(content, file.hasher)


def _part(target: Path) -> Path:
    """The file that a download is appended to."""
    return target.with_name(f".{target.name}.part")
