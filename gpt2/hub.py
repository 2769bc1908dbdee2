"""Files of a Hugging Face Hub data set, at one commit, straight to their place: each byte is on disk once.

huggingface_hub gives the session, the address, the token, the proxies and the errors. Its downloader is not used:
that of 2.4 starts a file anew after a kill, compares no hash and gives up at a 503, and its listing has no time-out.
Here a file goes on at the byte where it stopped, and gets its name only when its hash is the one that the Hub lists.
Plain HTTP with ranges is asked for, also of repositories that are kept in Xet.
"""

from __future__ import annotations

import email.utils
import errno
import fnmatch
import hashlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # the base class of the HTTP library's own errors, whichever library this version uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from gpt2.atomic import fsync_dir
from gpt2.config import HubFiles, HubShards, Section
from gpt2.errors import UserError
from gpt2.manifest import read_model, write_model

LISTING = "listing.json"
CHUNK = 1 << 20
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
WRONG_BYTES_LIMIT = 3  # whole downloads of one file with the wrong hash


@dataclass(frozen=True)
class Patience:
    """How often and how long to try again. A try that brought new bytes starts the count anew."""

    tries: int = 12
    first_wait: float = 0.5
    """seconds; doubled at each further failure"""
    longest_wait: float = 30.0
    longest_asked: float = 300.0
    """of a Retry-After: the Hub counts requests in windows of five minutes"""


class HubFile(Section):
    path: str
    """in the repository"""
    size: int
    sha256: str | None
    """of files in large-file storage"""
    blob: str
    """git's sha1 of the blob; for files in large-file storage that of their pointer, which says nothing here"""

    def hasher(self) -> Any:
        """A hash that ends as `expected` when it has seen the whole right file."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)  # as `git hash-object` takes it

    @property
    def expected(self) -> str:
        return self.sha256 or self.blob


class Listing(Section):
    """listing.json: what is to be downloaded. Kept, so that going on after a kill asks only for what is missing."""

    repo: str
    revision: str
    files: tuple[HubFile, ...]


def download(
    source: HubFiles | HubShards,
    formats: tuple[str, ...],
    directory: Path,
    *,
    workers: int,
    progress: Callable[[int, int, int], None],
    patience: Patience = Patience(),
) -> list[str]:
    """Download a source's files into `directory`/data/; see gpt2.sources.fetch, which is how it is called.

    Args:
        formats: the suffixes that its files may have.

    Raises:
        UserError: not found, no access, no network, no space, or wrong bytes again and again.
    """
    if constants.is_offline_mode():
        raise UserError(
            f"HF_HUB_OFFLINE is set, so {source.repo} cannot be downloaded: unset it, or use a source of kind local"
        )
    (directory / "data").mkdir(parents=True, exist_ok=True)
    listing_path = directory / LISTING
    if not listing_path.exists():
        write_model(listing_path, Hub(source.repo, source.revision, patience).listing(source.files, formats))
    return _Download(read_model(listing_path, Listing), directory, workers, patience).run(progress)


def known_sha256(directory: Path) -> dict[str, str]:
    """sha256 that downloaded files were verified against, by path relative to `directory`."""
    listing = read_model(directory / LISTING, Listing)
    return {relative(index, file): file.sha256 for index, file in enumerate(listing.files) if file.sha256 is not None}


def relative(index: int, file: HubFile) -> str:
    return f"data/{index:05d}-{PurePosixPath(file.path).name}"


class Hub:
    """One data set at one commit, as HF_ENDPOINT and HF_TOKEN say."""

    def __init__(self, repo: str, revision: str, patience: Patience) -> None:
        self.repo = repo
        self.revision = revision
        self.patience = patience
        self.endpoint = constants.ENDPOINT
        self.timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)  # seconds without a byte, not for the whole
        self.headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def listing(self, patterns: tuple[str, ...], formats: tuple[str, ...]) -> Listing:
        """The files that `patterns` match: patterns in the given order, sorted by path within each.

        "*" stays within a folder, "**" crosses folders.

        Raises:
            UserError: no such repository, revision or match, a format that is not among `formats`, no access.
        """
        chosen: dict[str, HubFile] = {}
        for pattern in patterns:
            parts = PurePosixPath(pattern).parts
            fixed = next((i for i, part in enumerate(parts[:-1]) if _has_magic(part)), len(parts) - 1)
            folder = "/".join(parts[:fixed])
            files = self._tree(folder, recursive=len(parts) - fixed > 1 or "**" in parts[fixed:])
            matches = sorted((f for f in files if _matches(f.path.split("/"), list(parts))), key=lambda f: f.path)
            if not matches:
                raise UserError(
                    f"nothing matches {pattern!r} in {self.repo} at {self.revision}: its folder {folder or '/'!r} has "
                    f"{len(files)} files" + (f", such as {files[0].path!r}" if files else "")
                )
            for file in matches:
                if not file.path.lower().endswith(formats):
                    raise UserError(
                        f"{file.path} in {self.repo}, matched by {pattern!r}, is of no known format: this source "
                        f"takes {', '.join(formats)}"
                    )
                chosen[file.path] = file
        return Listing(repo=self.repo, revision=self.revision, files=tuple(chosen.values()))

    def _tree(self, folder: str, recursive: bool) -> list[HubFile]:
        url = f"{self.endpoint}/api/datasets/{self.repo}/tree/{self.revision}"
        url += "/" + quote(folder, safe="") if folder else ""
        query = f"recursive={recursive}&expand=False"
        files = []
        while query:
            page, query = self._page(f"{url}?{query}")
            files += [
                HubFile(
                    path=item["path"],
                    size=item["size"],
                    sha256=item["lfs"]["oid"] if item.get("lfs") else None,
                    blob=item["oid"],
                )
                for item in page
                if item["type"] == "file"
            ]
        return files

    def _page(self, url: str) -> tuple[list[dict[str, Any]], str]:
        """One page of a listing and the query of the next, empty at the end."""
        retries = Retries(f"list {self.repo}", Patience(tries=min(5, self.patience.tries)), threading.Event())
        while True:
            try:
                response = get_session().get(url, headers=self.headers, timeout=self.timeout)
                hf_raise_for_status(response)
                page = response.json()
                # only the query is taken over: the token goes to no other host
                return page, urlsplit(response.links.get("next", {}).get("url", "")).query
            except EntryNotFoundError:
                return [], ""
            except (HTTPError, ValueError) as error:
                retries.failed(error, self.explain(error))

    def stream(self, file: HubFile, start: int) -> Iterator[tuple[int, bytes]]:
        """The file's bytes from `start` on as (offset, chunk). The offset begins at 0 where the server does not know
        ranges, or says that the file ends before `start`."""
        url = f"{self.endpoint}/datasets/{self.repo}/resolve/{self.revision}/{quote(file.path)}"
        headers = self.headers | ({"Range": f"bytes={start}-"} if start else {})
        with get_session().stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
            if response.status_code == 416:
                yield 0, b""
                raise HTTPError(f"the server's file ends before byte {start:,}")
            hf_raise_for_status(response)
            offset = start if response.status_code == 206 else 0
            for chunk in response.iter_bytes():  # as they come: a cut loses nothing that arrived
                yield offset, chunk
                offset += len(chunk)

    def explain(self, error: Exception) -> str | None:
        """What the user can do about an error that no second try will put right; None for the others."""
        at = f"{self.repo} at {self.endpoint}"
        if isinstance(error, GatedRepoError):
            return f"{at} is open only to those who agreed to its terms: do so on its page, then set HF_TOKEN"
        if isinstance(error, RepositoryNotFoundError):
            return f"there is no data set {at}, or it is private: correct the source's repo, or set HF_TOKEN"
        if isinstance(error, RevisionNotFoundError):
            return f"{at} has no revision {self.revision}: correct the source's revision"
        if isinstance(error, EntryNotFoundError):
            return f"{at} lists a file that it does not have: {_first_line(error)}"
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it, or use a source of kind local"
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT:
            status = error.response.status_code
            access = ": set HF_TOKEN to a token with access" if status in (401, 403) else f": {_first_line(error)}"
            return f"{at} answers {status}{access}"
        return None


class Retries:
    """Waits after each failure, longer each time, and gives up after too many in a row."""

    def __init__(self, what: str, patience: Patience, stop: threading.Event) -> None:
        self.what = what
        self.patience = patience
        self.stop = stop
        self.failures = 0

    def progressed(self) -> None:
        self.failures = 0

    def failed(self, error: Exception, hopeless: str | None) -> None:
        """Wait, unless `hopeless` says why that is no use.

        Raises:
            UserError: it is no use, or it failed too often.
        """
        if hopeless is not None:
            raise UserError(hopeless) from error
        self.failures += 1
        if self.failures >= self.patience.tries:
            raise UserError(
                f"could not {self.what}, {self.failures} tries in a row: {_first_line(error)}; check the network and "
                "HF_ENDPOINT and run again, it goes on where it stopped"
            ) from error
        backoff = min(self.patience.longest_wait, self.patience.first_wait * 2 ** (self.failures - 1))
        seconds = backoff * random.uniform(0.75, 1.25)  # so that the workers do not come back all at once
        asked = _asked_to_wait(error)
        if asked is not None:
            seconds = min(asked, self.patience.longest_asked) + random.uniform(0.0, 0.5)
        if seconds >= 5:
            print(f"could not {self.what} ({_first_line(error)}); trying again in {seconds:.0f} s", flush=True)
        self.stop.wait(seconds)


class _Stopped(Exception):
    """Another file failed for good; this one is left as it is."""


class _Download:
    """The files of one listing, several at a time."""

    def __init__(self, listing: Listing, directory: Path, workers: int, patience: Patience) -> None:
        self.listing = listing
        self.directory = directory
        self.workers = workers
        self.hub = Hub(listing.repo, listing.revision, patience)
        self.patience = patience
        self.stop = threading.Event()
        self.received = [0] * len(listing.files)  # bytes on disk, by file; each worker writes its own only

    def run(self, progress: Callable[[int, int, int], None]) -> list[str]:
        files = self.listing.files
        targets = [self.directory / relative(index, file) for index, file in enumerate(files)]
        missing = []
        for index, (file, target) in enumerate(zip(files, targets, strict=True)):
            whole = target.exists() and target.stat().st_size == file.size  # has its name only when verified
            part = _part(target)
            self.received[index] = file.size if whole else part.stat().st_size if part.exists() else 0
            if not whole:
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
                "make room, set runtime.store to a larger disk, or take fewer files"
            )

    def _fetch(self, index: int, file: HubFile, target: Path) -> None:
        try:
            for _ in range(WRONG_BYTES_LIMIT):
                got = self._receive(index, file, _part(target))
                if got == file.expected:
                    _part(target).replace(target)
                    fsync_dir(target.parent)
                    return
                _part(target).unlink()
                kind = "sha256" if file.sha256 else "git blob sha1"
                print(f"download: {file.path} has {kind} {got}, not {file.expected}; fetching it again", flush=True)
            raise UserError(
                f"{file.path} of {self.listing.repo}: {kind} {got} came, the Hub lists {file.expected}, "
                f"{WRONG_BYTES_LIMIT} times in a row; a proxy or mirror between changes it: check HF_ENDPOINT"
            )
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"no space left for {target}: free some and run again, it goes on where it stopped"
                ) from error
            raise

    def _receive(self, index: int, file: HubFile, part: Path) -> str:
        """Bring `part` to the file's size, from whatever it holds; the hash of what it holds then."""
        retries = Retries(f"download {file.path} of {self.listing.repo}", self.patience, self.stop)
        with open(part, "ab") as out:
            have = min(out.tell(), file.size)
            out.truncate(have)
            digest = _hash_of(part, file)
            furthest = have
            while have < file.size:
                try:
                    for offset, chunk in self.hub.stream(file, have):
                        if self.stop.is_set():
                            raise _Stopped
                        if offset != have:  # the server starts over
                            out.truncate(offset)
                            digest = _hash_of(part, file)
                            have = offset
                        chunk = chunk[: file.size - have]
                        out.write(chunk)
                        digest.update(chunk)
                        have += len(chunk)
                        self.received[index] = have
                        if have > furthest:  # only new bytes count: a server may send the first ones for ever
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
                        raise _Stopped from error
            out.flush()
            os.fsync(out.fileno())
        return str(digest.hexdigest())


def _hash_of(part: Path, file: HubFile) -> Any:
    digest = file.hasher()
    with open(part, "rb") as written:
        while block := written.read(CHUNK):
            digest.update(block)
    return digest


def _part(target: Path) -> Path:
    """Where a file grows until it is whole."""
    return target.with_name(f".{target.name}.part")


def _has_magic(part: str) -> bool:
    return any(letter in part for letter in "*?[")


def _matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _asked_to_wait(error: Exception) -> float | None:
    """Seconds that the answer asks to wait: Retry-After in seconds or as a date, or the Hub's own RateLimit."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
        except ValueError:
            pass
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split("\n")).strip()
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
