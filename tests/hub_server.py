"""A fake Hugging Face Hub for tests, with small data sets and injected faults.

Implemented are the listing of a tree (in pages), the resolving of a file (HEAD and GET, with the Hub's headers), the
redirection of large files to storage on another host and of small ones to another path, ranges, and the Hub's errors.
test_download.py checks it with huggingface_hub's own client.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".parquet", ".bin", ".gz")
REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """A fault of one request for a file's bytes or for a page of a listing."""

    kind: str
    """status, cut (the connection, after `after` bytes), stall (after `after` bytes), wrong (bytes), short (a body
    that ends early without an error), no-ranges (answers 200 with the whole)"""
    status: int = 503
    headers: tuple[tuple[str, str], ...] = ()
    after: int = 0


@dataclass
class Seen:
    """One request, and the number of bytes sent for it."""

    method: str
    path: str
    host: str
    """hub or storage"""
    start: int
    authorization: str | None
    time: float
    sent: int = 0


@dataclass
class Dataset:
    files: dict[str, bytes]
    private: bool = False
    gated: bool = False
    token: str = "hf_right"
    sizes: dict[str, int] = field(default_factory=dict)
    """sizes that the listing reports instead of the true ones"""

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        size = self.sizes.get(path, len(data))
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
            lfs = {"oid": sha256, "size": size, "pointerSize": len(pointer)}
            more = {"oid": _blob(pointer), "lfs": lfs, "xetHash": hashlib.sha256(b"xet" + data).hexdigest()}
        else:
            more = {"oid": _blob(data)}
        return {"type": "file", "path": path, "size": size, **more}

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]] | None:
        """None where there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(self.files) if path.startswith(prefix)]
        if not inside:
            return None
        folders: dict[str, None] = {}
        files = []
        for path in inside:
            below = path[len(prefix) :].split("/")
            for depth in range(1, len(below)):
                if recursive or depth == 1:
                    folders[prefix + "/".join(below[:depth])] = None
            if recursive or len(below) == 1:
                files.append(self.entry(path))
        return [{"type": "directory", "path": path, "oid": _blob(path.encode())} for path in folders] + files


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Two servers, hub and storage, on two ports of this machine."""

    def __init__(self, page: int = 1000, chunk: int = 1 << 16, seconds_per_chunk: float = 0.0) -> None:
        self.datasets: dict[str, Dataset] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        """by path in the repository, or "tree" for listings; each is used once, in order"""
        self.always: dict[str, Fault] = {}
        """by path: a fault that never ends"""
        self.seen: list[Seen] = []
        self.page = page
        self.chunk = chunk
        self.seconds_per_chunk = seconds_per_chunk
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._servers = [_Server(self, "hub"), _Server(self, "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def requests(self, text: str, method: str = "GET", host: str | None = None) -> list[Seen]:
        """Requests whose path contains `text`."""
        return [seen for seen in self.seen if seen.method == method and text in seen.path and host in (None, seen.host)]

    def count(self, more: int) -> None:
        with self.lock:
            self.in_flight += more
            self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def fault(self, key: str) -> Fault | None:
        with self.lock:
            if self.faults[key]:
                return self.faults[key].pop(0)
            return self.always.get(key)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.name = name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or is killed, is no error here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        byte_range = self.headers.get("Range", "bytes=0-")
        seen = Seen(
            self.command,
            unquote(url.path),
            self.server.name,
            int(byte_range.removeprefix("bytes=").split("-")[0]),
            self.headers.get("Authorization"),
            time.time(),
        )
        self.server.hub.seen.append(seen)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self.server.name == "storage":  # /owner/name/path
            self._bytes("/".join(parts[:2]), "/".join(parts[2:]), seen, {})
            return
        if parts[:2] == ["api", "resolve-cache"]:  # /api/resolve-cache/datasets/owner/name/revision/path
            self._small("/".join(parts[3:5]), "/".join(parts[6:]), seen)
            return
        if parts[:1] == ["api"] and parts[1] in ("datasets", "models") and parts[4:5] == ["tree"]:
            self._tree("/".join(parts[2:4]), parts[5], "/".join(parts[6:]), parse_qs(url.query))
            return
        if parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self._resolve("/".join(parts[1:3]), parts[4], "/".join(parts[5:]), seen)
            return
        if parts[2:3] == ["resolve"]:  # of a model
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), seen)
            return
        self._error(404, "", "no such page")

    def _error(self, status: int, code: str, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        for name, value in (*headers, ("X-Error-Code", code), ("X-Error-Message", message)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _dataset(self, repo: str, revision: str) -> Dataset | None:
        """The data set if this request may see it; otherwise the error is answered."""
        dataset = self.server.hub.datasets.get(repo)
        allowed = dataset is not None and self.headers.get("Authorization") == f"Bearer {dataset.token}"
        if dataset is None or (dataset.private and not allowed):
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        if dataset.gated and not allowed:
            self._error(403, "GatedRepo", "Access to dataset is restricted")
            return None
        if revision != REVISION:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return dataset

    def _tree(self, repo: str, revision: str, folder: str, query: dict[str, list[str]]) -> None:
        hub = self.server.hub
        fault = hub.fault("tree")
        if fault is not None and fault.kind == "status":
            self._error(fault.status, "", "injected fault", fault.headers)
            return
        if fault is not None and fault.kind == "stall":
            hub.closing.wait(30)
            return
        dataset = self._dataset(repo, revision)
        if dataset is None:
            return
        entries = dataset.tree(folder, query.get("recursive", ["False"])[0].lower() == "true")
        if entries is None:
            self._error(404, "EntryNotFound", f"{folder} does not exist")
            return
        start = int(query.get("cursor", ["0"])[0])
        body = json.dumps(entries[start : start + hub.page]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if start + hub.page < len(entries):
            recursive = query.get("recursive", ["False"])[0]
            target = f"{hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + hub.page}"
            self.send_header("Link", f'<{target}>; rel="next"')
        self.end_headers()
        self.wfile.write(body)

    def _resolve(self, repo: str, revision: str, path: str, seen: Seen) -> None:
        dataset = self._dataset(repo, revision)
        if dataset is None:
            return
        if path not in dataset.files:
            self._error(404, "EntryNotFound", f"{path} does not exist", (("X-Repo-Commit", REVISION),))
            return
        entry = dataset.entry(path)
        large = "lfs" in entry
        self.send_response(302 if large else 307)
        self.send_header("X-Repo-Commit", REVISION)
        if large:
            self.send_header("X-Linked-Size", str(entry["size"]))
            self.send_header("X-Linked-Etag", f'"{entry["lfs"]["oid"]}"')
            self.send_header("X-Xet-Hash", entry["xetHash"])
            self.send_header("Location", f"{self.server.hub.storage_url}/{repo}/{quote(path)}")
        else:
            self.send_header("ETag", f'"{entry["oid"]}"')
            self.send_header("Location", f"/api/resolve-cache/datasets/{repo}/{REVISION}/{quote(path)}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _small(self, repo: str, path: str, seen: Seen) -> None:
        oid = self.server.hub.datasets[repo].entry(path)["oid"]
        self._bytes(repo, path, seen, {"X-Repo-Commit": REVISION, "ETag": f'"{oid}"'})

    def _bytes(self, repo: str, path: str, seen: Seen, headers: dict[str, str]) -> None:
        hub = self.server.hub
        data = hub.datasets[repo].files[path]
        fault = hub.fault(path) if self.command == "GET" else None
        kind = fault.kind if fault is not None else ""
        if fault is not None and kind == "status":
            self._error(fault.status, "", "injected fault", fault.headers)
            return
        if kind == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0 if kind == "no-ranges" else seen.start
        if start >= len(data) and start:
            self._error(416, "", "range not satisfiable", (("Content-Range", f"bytes */{len(data)}"),))
            return
        body = memoryview(data)[start:]
        if fault is not None and kind == "short":
            body = body[: fault.after]
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = fault.after if fault is not None and kind in ("cut", "stall") else len(body)
        hub.count(1 if stop else 0)
        for offset in range(0, stop, hub.chunk):
            if hub.seconds_per_chunk:
                hub.closing.wait(hub.seconds_per_chunk)
            piece = body[offset : min(offset + hub.chunk, stop)]
            seen.sent += len(piece)
            if offset + hub.chunk >= stop:
                hub.count(-1)  # before the client has the last bytes and asks for the next file
            self.wfile.write(piece)
        if kind == "stall":
            hub.closing.wait(30)
        if kind in ("cut", "stall"):
            self.close_connection = True
