"""A data set on the Hugging Face Hub, at one commit: which files it has, and their bytes.

huggingface_hub gives the session, the address, the token, the proxies and the errors. Its downloader is not used:
that of 2.4 starts a file anew after a kill, compares no hash and gives up at a 503, and its listing has no time-out.
Here bytes are asked for from any offset, over plain HTTP, also of repositories that are kept in Xet.
"""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal
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
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from gpt2.config.section import Section
from gpt2.download.retries import TRANSIENT_STATUSES, Retrier, RetryPolicy, first_line
from gpt2.errors import UserError


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


class HubListing(Section):
    """listing.json: what is to be downloaded. Kept, so that going on after a kill asks only for what is missing."""

    repo: str
    revision: str
    files: tuple[HubFile, ...]
    kind: Literal["datasets", "models"] = "datasets"


class HubRepo:
    """One data set (or model) at one commit, as HF_ENDPOINT and HF_TOKEN say."""

    def __init__(
        self, repo: str, revision: str, retry_policy: RetryPolicy, kind: Literal["datasets", "models"] = "datasets"
    ) -> None:
        self.repo = repo
        self.kind = kind
        self.revision = revision
        self.retry_policy = retry_policy
        self.endpoint = constants.ENDPOINT
        self.timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)  # seconds without a byte, not for the whole
        self.headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def listing(self, patterns: tuple[str, ...], formats: tuple[str, ...]) -> HubListing:
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
        return HubListing(repo=self.repo, revision=self.revision, files=tuple(chosen.values()), kind=self.kind)

    def _tree(self, folder: str, recursive: bool) -> list[HubFile]:
        url = f"{self.endpoint}/api/{self.kind}/{self.repo}/tree/{self.revision}"
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
        retries = Retrier(
            f"list {self.repo}", RetryPolicy(max_tries=min(5, self.retry_policy.max_tries)), threading.Event()
        )
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
        folder = "datasets/" if self.kind == "datasets" else ""  # the addresses of models have no such part
        url = f"{self.endpoint}/{folder}{self.repo}/resolve/{self.revision}/{quote(file.path)}"
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
            what = {"datasets": "data set", "models": "model"}[self.kind]
            return f"there is no {what} {at}, or it is private: correct the source's repo, or set HF_TOKEN"
        if isinstance(error, RevisionNotFoundError):
            return f"{at} has no revision {self.revision}: correct the source's revision"
        if isinstance(error, EntryNotFoundError):
            return f"{at} lists a file that it does not have: {first_line(error)}"
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it, or use a source of kind local"
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT_STATUSES:
            status = error.response.status_code
            access = ": set HF_TOKEN to a token with access" if status in (401, 403) else f": {first_line(error)}"
            return f"{at} answers {status}{access}"
        return None


def _has_magic(part: str) -> bool:
    return any(letter in part for letter in "*?[")


def _matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
