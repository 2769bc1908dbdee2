"""A repository of the Hugging Face Hub at one commit: its files and their bytes.

huggingface_hub provides session, endpoint, token, proxies and errors. Its downloads and listings are not used: in 2.4,
hf_hub_download restarts a file after a kill, verifies no hash and fails on a 503, and HfApi.list_repo_tree sends its
requests without a time-out. This module requests bytes from any offset over plain HTTP, also from Xet repositories.
"""

from __future__ import annotations

import glob
import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from fsspec.utils import glob_translate  # type: ignore[import-untyped]
from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # base class of the HTTP library's errors, whichever library this version uses
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
    """None outside large-file storage"""
    blob: str
    """git's sha1 of the blob; in large-file storage, that of the pointer file"""

    def hasher(self) -> Any:
        """A hash object whose digest of the correct file is `expected`."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)  # as `git hash-object`

    @property
    def expected(self) -> str:
        return self.sha256 or self.blob


class HubListing(Section):
    """listing.json: the files to download. Kept, so that a restart requests only missing bytes."""

    repo: str
    revision: str
    files: tuple[HubFile, ...]
    kind: Literal["datasets", "models"] = "datasets"


class HubRepo:
    """One data set or model at one commit, through HF_ENDPOINT and with HF_TOKEN."""

    def __init__(
        self, repo: str, revision: str, retry_policy: RetryPolicy, kind: Literal["datasets", "models"] = "datasets"
    ) -> None:
        self.repo = repo
        self.kind = kind
        self.revision = revision
        self.retry_policy = retry_policy
        self.endpoint = constants.ENDPOINT
        self.timeout = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)  # seconds without a byte
        self.headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def listing(self, patterns: tuple[str, ...], formats: tuple[str, ...]) -> HubListing:
        """The files that `patterns` match: in the order of the patterns, sorted by path within each.

        "*" matches within a folder, "**" across folders.

        Raises:
            UserError: no such repository, revision or match, an invalid pattern, a suffix that is not among `formats`,
                or no access.
        """
        selected: dict[str, HubFile] = {}
        for pattern in patterns:
            parts = PurePosixPath(pattern).parts
            try:
                matches_pattern = re.compile(glob_translate(pattern)).match
            except ValueError as error:
                raise UserError(f"{pattern!r} is not a valid pattern: {error}") from error
            fixed = next((i for i, part in enumerate(parts[:-1]) if glob.has_magic(part)), len(parts) - 1)
            folder = "/".join(parts[:fixed])
            files = self._tree(folder, recursive=len(parts) - fixed > 1 or "**" in parts[fixed:])
            matches = sorted((file for file in files if matches_pattern(file.path)), key=lambda file: file.path)
            if not matches:
                raise UserError(
                    f"nothing matches {pattern!r} in {self.repo} at {self.revision}: its folder {folder or '/'!r} has "
                    f"{len(files)} files" + (f", such as {files[0].path!r}" if files else "")
                )
            for file in matches:
                if not file.path.lower().endswith(formats):
                    raise UserError(
                        f"{file.path} in {self.repo}, matched by {pattern!r}, has no known suffix: this source "
                        f"accepts {', '.join(formats)}"
                    )
                selected[file.path] = file
        return HubListing(repo=self.repo, revision=self.revision, files=tuple(selected.values()), kind=self.kind)

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
        """One page of a listing, and the query of the next page, empty at the end."""
        retries = Retrier(
            f"list {self.repo}", RetryPolicy(max_tries=min(5, self.retry_policy.max_tries)), threading.Event()
        )
        while True:
            try:
                response = get_session().get(url, headers=self.headers, timeout=self.timeout)
                hf_raise_for_status(response)
                page = response.json()
                # only the query of the link: the token is sent to no other host
                return page, urlsplit(response.links.get("next", {}).get("url", "")).query
            except EntryNotFoundError:
                return [], ""
            except (HTTPError, ValueError) as error:
                retries.failed(error, self.explain(error))

    def stream(self, file: HubFile, start: int) -> Iterator[tuple[int, bytes]]:
        """The file's bytes from `start` on as (offset, chunk). Offsets begin at 0 if the server ignores ranges or its
        file ends before `start`.

        Raises:
            HTTPError: the request failed, or the connection was cut.
        """
        prefix = "datasets/" if self.kind == "datasets" else ""
        url = f"{self.endpoint}/{prefix}{self.repo}/resolve/{self.revision}/{quote(file.path)}"
        headers = self.headers | ({"Range": f"bytes={start}-"} if start else {})
        with get_session().stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
            if response.status_code == 416:
                yield 0, b""
                raise HTTPError(f"the server's file ends before byte {start:,}")
            hf_raise_for_status(response)
            offset = start if response.status_code == 206 else 0
            for chunk in response.iter_bytes():  # unbuffered: a cut connection loses no received byte
                yield offset, chunk
                offset += len(chunk)

    def explain(self, error: Exception) -> str | None:
        """The message for an error that a retry does not resolve; None for transient errors."""
        at = f"{self.repo} at {self.endpoint}"
        if isinstance(error, GatedRepoError):
            return f"{at} is gated: accept its terms on its page, then set HF_TOKEN"
        if isinstance(error, RepositoryNotFoundError):
            kind = {"datasets": "data set", "models": "model"}[self.kind]
            return f"the {kind} {at} does not exist or is private: correct the source's repo, or set HF_TOKEN"
        if isinstance(error, RevisionNotFoundError):
            return f"{at} has no revision {self.revision}: correct the source's revision"
        if isinstance(error, EntryNotFoundError):
            return f"{at} lists a file but does not serve it: {first_line(error)}"
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it, or use a source of kind local"
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT_STATUSES:
            status = error.response.status_code
            access = ": set HF_TOKEN to a token with access" if status in (401, 403) else f": {first_line(error)}"
            return f"{at} answers {status}{access}"
        return None
