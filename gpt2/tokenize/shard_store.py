"""Where shards are kept, a stage's directory or any fsspec address, with the record that resuming needs."""

from __future__ import annotations

import hashlib
import platform
import shutil
from pathlib import Path
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]

from gpt2.config.section import Section
from gpt2.errors import UserError
from gpt2.shards import HEADER_BYTES, TOKEN, read_header
from gpt2.stage.facts import RelativePath, Skipped, TokenizeFacts
from gpt2.stage.manifest import Damaged, M, canonical, read_model, write_model
from gpt2.tokenize.reading import TransientReadError

SHARDS = "shards"
PROGRESS = "progress.json"
FACTS = "facts.json"


class StreamPosition(Section):
    """A position in the stream: `tokens` tokens into unit `unit`."""

    unit: int = 0
    tokens: int = 0


class ShardRecord(Section):
    """A complete shard, and the position in the corpus where it ends."""

    path: RelativePath
    """relative to the stage's directory"""
    tokens: int
    documents: int
    sha256: str
    end: StreamPosition
    skipped: tuple[Skipped, ...] = ()
    """rows skipped since the end of the previous shard"""


class ResumeState(Section):
    """progress.json, rewritten after every shard."""

    plan: str
    """fingerprint of the units and of how they are cut into shards; another plan starts over"""
    shards: tuple[ShardRecord, ...] = ()


def shard_name(prefix: str, index: int, n_val: int = 1) -> str:
    """Name of shard `index`, relative to the stage's directory; the first `n_val` shards are for validation."""
    split = "val" if index < n_val else "train"
    return f"{SHARDS}/{prefix}_{split}_{index:06d}.bin"


def split_of(path: str) -> Literal["val", "train"]:
    return "val" if "_val_" in Path(path).name else "train"


def shard_bytes(tokens: int) -> int:
    return HEADER_BYTES + TOKEN.itemsize * tokens


class ShardStore:
    """Keeps complete shards in a stage's directory."""

    def __init__(self, path: Path, made_from: str = "") -> None:
        """
        Args:
            made_from: fingerprint of the input files; a plan holds only their names and sizes.
        """
        self.path, self._made_from = path, made_from

    def fingerprint(self, plan: str) -> str:
        """Hash of `plan` and of everything else that decides the bytes."""
        return hashlib.sha256(canonical([plan, self._made_from]).encode()).hexdigest()

    def free(self) -> int | None:
        """Free bytes; None where the file system does not report them."""
        return shutil.disk_usage(self.path).free

    def local(self, name: str) -> Path:
        """Path to write shard `name` to."""
        return self.path / name

    def keep(self, name: str) -> None:
        """Called when shard `name` is complete."""

    def size(self, name: str) -> int | None:
        """Bytes of a kept shard; None if it is missing or invalid."""
        try:
            return shard_bytes(read_header(self.path / name))
        except UserError:
            return None

    def names(self) -> list[str]:
        """All files in the folder of shards."""
        folder = self.path / SHARDS
        return [f"{SHARDS}/{path.name}" for path in folder.iterdir()] if folder.exists() else []

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def read_progress(self) -> ResumeState | None:
        try:
            return read_model(self.path / PROGRESS, ResumeState)
        except (FileNotFoundError, Damaged):
            return None

    def write_progress(self, progress: ResumeState) -> None:
        write_model(self.path / PROGRESS, progress)


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of a path or address, and the path in it.

    Raises:
        UserError: the protocol is unknown or needs a package that is not installed.
    """
    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError as error:  # it names the package
        raise UserError(f"{address} cannot be reached from {platform.node()}: {error} (with pip)") from error
    except ValueError as error:
        raise UserError(f"{address} is no valid address: {error}") from error
    return system, path.rstrip("/")


VERSION_FIELDS = (
    "mtime", "created", "ino",  # local files, of which "created" is ctime
    "ETag", "etag", "Content-MD5", "content_md5", "md5Hash", "md5", "checksum", "Digest",
    "VersionId", "version_id", "generation",
    "LastModified", "last_modified", "Last-Modified", "updated", "modified",
)  # fmt: skip
"""fields of fsspec's file systems that change with a file's content"""


def version_of(address: str) -> dict[str, str]:
    """A file's address, its size, and those of VERSION_FIELDS that its file system reports.

    Raises:
        UserError: the file does not exist.
        TransientReadError: a read failed for a reason other than the content.
    """
    system, path = file_system(address)
    system.invalidate_cache()  # cached listings are stale
    try:
        info = system.info(path)
    except FileNotFoundError:
        name = address.rsplit("/", 1)[-1]
        raise UserError(f"data file {name} is missing ({address}): correct the address") from None
    except OSError as error:
        raise TransientReadError(f"{address} cannot be read now ({error}): resolve this and run again") from error
    version = {name: str(info[name]) for name in VERSION_FIELDS if info.get(name) is not None}
    if not version:
        print(f"{address}: no checksum or time is known; a change of the same size is not detected", flush=True)
    return {"address": system.unstrip_protocol(path), "size": str(info.get("size"))} | version


class OutputFacts(TokenizeFacts):
    """facts.json of a finished output."""

    plan: str = ""
    """fingerprint of everything that decides the bytes"""


class RemoteShardStore(ShardStore):
    """Keeps complete shards at an fsspec address. The shard that is being filled and those that are being uploaded, at
    most MAX_PENDING + 1, are in the local folder `scratch`."""

    def __init__(self, scratch: Path, address: str, made_from: str = "") -> None:
        self._fs, self._root = file_system(address)
        super().__init__(Path(self._root), made_from)
        self._scratch, self._address = scratch, address.rstrip("/")
        self._fs.invalidate_cache()  # other processes may have written

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def free(self) -> int | None:
        if "file" not in (self._fs.protocol, *self._fs.protocol):
            return None
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def local(self, name: str) -> Path:
        return self._scratch / name

    def keep(self, name: str) -> None:
        self._fs.makedirs(self._path(SHARDS), exist_ok=True)
        # A temporary name first: outside object stores, a copy is visible before it is complete.
        self._fs.put_file(str(self.local(name)), self._path(f"{name}.tmp"))
        self._fs.mv(self._path(f"{name}.tmp"), self._path(name))
        self.local(name).unlink()

    def size(self, name: str) -> int | None:
        try:
            return int(self._fs.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        try:
            paths = self._fs.ls(self._path(SHARDS), detail=False)
        except FileNotFoundError:
            return []
        return [f"{SHARDS}/{path.rsplit('/', 1)[-1]}" for path in paths]

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._path(name))

    def read_progress(self) -> ResumeState | None:
        return self._read(PROGRESS, ResumeState)

    def write_progress(self, progress: ResumeState) -> None:
        self._write(PROGRESS, progress.model_dump_json())

    def finish(self, facts: OutputFacts) -> None:
        self._write(FACTS, facts.model_dump_json(indent=2))
        self._fs.rm_file(self._path(PROGRESS))

    def finished(self, plan: str) -> OutputFacts | None:
        """The facts of a finished output; None if it is not finished.

        Raises:
            UserError: the output has another plan, or a shard is missing or has another size.
        """
        facts = self._read(FACTS, OutputFacts)
        if facts is None:
            return None
        remedy = f"name another --output, or delete {self._address}/{FACTS} and {self._address}/{SHARDS}"
        if facts.plan != plan:
            raise UserError(
                f"{self._address} holds {len(facts.shards)} finished shards of other inputs, another column or other "
                f"settings: {remedy}"
            )
        for shard in facts.shards:
            if (size := self.size(shard.path)) != shard_bytes(shard.tokens):
                problem = "is missing" if size is None else f"has {size:,} bytes, not {shard_bytes(shard.tokens):,}"
                raise UserError(f"{self._address} was finished, and now {shard.path} {problem}: {remedy}")
        return facts

    def _read(self, name: str, model: type[M]) -> M | None:
        try:
            return model.model_validate_json(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{self._address}/{name} is not a valid {model.__name__} (cut off?): restore it, or delete it and run "
                f"again to make all shards again"
            ) from error

    def _write(self, name: str, text: str) -> None:
        """Write atomically."""
        self._fs.pipe_file(self._path(f"{name}.tmp"), text.encode())
        self._fs.mv(self._path(f"{name}.tmp"), self._path(name))
