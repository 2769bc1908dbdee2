"""Where shards go, a stage's directory or any address, and what is written down there so that work can go on."""

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
from gpt2.tokenize.reading import CannotReadNow

FOLDER = "shards"
PROGRESS = "progress.json"
FACTS = "facts.json"


class Place(Section):
    """A place in the stream: so many tokens into a unit. What is skipped belongs to the place where it was met."""

    unit: int = 0
    tokens: int = 0


class WholeShard(Section):
    """A shard that is on disk, and what had been seen of the corpus when it was full."""

    path: RelativePath
    """relative to the stage's directory"""
    tokens: int
    documents: int
    sha256: str
    end: Place
    skipped: tuple[Skipped, ...] = ()
    """since the end of the shard before"""


class Progress(Section):
    """progress.json: written with every shard."""

    plan: str
    """fingerprint of the units and of how they are cut into shards; work on another plan starts over"""
    shards: tuple[WholeShard, ...] = ()


def shard_name(prefix: str, index: int, n_val: int = 1) -> str:
    """Of shard `index`, the first `n_val` of which are for validation; relative to the stage's directory."""
    split = "val" if index < n_val else "train"
    return f"{FOLDER}/{prefix}_{split}_{index:06d}.bin"


def split_of(path: str) -> Literal["val", "train"]:
    return "val" if "_val_" in Path(path).name else "train"


def shard_bytes(tokens: int) -> int:
    return HEADER_BYTES + TOKEN.itemsize * tokens


class Folder:
    """Where whole shards go: a stage's directory."""

    def __init__(self, path: Path, made_from: str = "") -> None:
        """
        Args:
            made_from: fingerprint of the files that are read, which `plan` knows by name and size only.
        """
        self.path, self._made_from = path, made_from

    def fingerprint(self, plan: str) -> str:
        """`plan` with whatever else decides the bytes."""
        return hashlib.sha256(canonical([plan, self._made_from]).encode()).hexdigest()

    def free(self) -> int | None:
        """Bytes of space that is left; None: nobody can say."""
        return shutil.disk_usage(self.path).free

    def local(self, name: str) -> Path:
        """Where shard `name` is written."""
        return self.path / name

    def keep(self, name: str) -> None:
        """Shard `name` is whole."""

    def size(self, name: str) -> int | None:
        """Bytes of a shard that was kept; None: it is not there, or is no shard."""
        try:
            return shard_bytes(read_header(self.path / name))
        except UserError:
            return None

    def names(self) -> list[str]:
        """Everything that lies in the shards' folder."""
        folder = self.path / FOLDER
        return [f"{FOLDER}/{path.name}" for path in folder.iterdir()] if folder.exists() else []

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def read_progress(self) -> Progress | None:
        try:
            return read_model(self.path / PROGRESS, Progress)
        except (FileNotFoundError, Damaged):
            return None

    def write_progress(self, progress: Progress) -> None:
        write_model(self.path / PROGRESS, progress)


def file_system(address: str) -> tuple[Any, str]:
    """What reaches a path or an address, and the path there.

    Raises:
        UserError: a package is missing for it, or there is no such kind of address.
    """
    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError as error:  # it names the package
        raise UserError(f"{address} cannot be reached from {platform.node()}: {error} (with pip)") from error
    except ValueError as error:
        raise UserError(f"{address} is no address that can be reached: {error}") from error
    return system, path.rstrip("/")


VERSION_FIELDS = (
    "mtime", "created", "ino",  # local files, of which "created" is ctime
    "ETag", "etag", "Content-MD5", "content_md5", "md5Hash", "md5", "checksum", "Digest",
    "VersionId", "version_id", "generation",
    "LastModified", "last_modified", "Last-Modified", "updated", "modified",
)  # fmt: skip
"""by which fsspec's file systems tell one content of a file from the next"""


def version_of(address: str) -> dict[str, str]:
    """Where a file lies, its size, and checksum, ETag, modification time or inode, as far as its file system has them.

    Raises:
        UserError: there is no such file.
        CannotReadNow: it may be readable another time.
    """
    system, path = file_system(address)
    system.invalidate_cache()  # of listings, which hold what was there before
    try:
        info = system.info(path)
    except FileNotFoundError:
        name = address.rsplit("/", 1)[-1]
        raise UserError(f"data file {name} is missing ({address}): correct the address") from None
    except OSError as error:
        raise CannotReadNow(f"{address} cannot be read now ({error}): put that right and run again") from error
    found = {name: str(info[name]) for name in VERSION_FIELDS if info.get(name) is not None}
    if not found:
        print(f"{address}: no checksum and no time is known; a change that keeps the size goes unnoticed", flush=True)
    return {"address": system.unstrip_protocol(path), "size": str(info.get("size"))} | found


class OutputFacts(TokenizeFacts):
    """facts.json of an output: the sign that all is there."""

    plan: str = ""
    """fingerprint of everything that decides the bytes"""


class RemoteFolder(Folder):
    """Whole shards are moved to an address. Those on their way, and the one that is being written, lie in `scratch`, a
    folder of this machine: AT_ONCE + 1 at most."""

    def __init__(self, scratch: Path, address: str, made_from: str = "") -> None:
        self._there, self._root = file_system(address)
        super().__init__(Path(self._root), made_from)
        self._scratch, self._address = scratch, address.rstrip("/")
        self._there.invalidate_cache()  # others may have written there

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def free(self) -> int | None:
        if "file" not in (self._there.protocol, *self._there.protocol):
            return None
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        return shutil.disk_usage(there).free

    def local(self, name: str) -> Path:
        return self._scratch / name

    def keep(self, name: str) -> None:
        self._there.makedirs(self._at(FOLDER), exist_ok=True)
        # Under another name first, for where a copy can be seen half done; an object store's appears whole anyway.
        self._there.put_file(str(self.local(name)), self._at(f"{name}.tmp"))
        self._there.mv(self._at(f"{name}.tmp"), self._at(name))
        self.local(name).unlink()

    def size(self, name: str) -> int | None:
        try:
            return int(self._there.info(self._at(name))["size"])
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        try:
            found = self._there.ls(self._at(FOLDER), detail=False)
        except FileNotFoundError:
            return []
        return [f"{FOLDER}/{path.rsplit('/', 1)[-1]}" for path in found]

    def remove(self, name: str) -> None:
        self._there.rm_file(self._at(name))

    def read_progress(self) -> Progress | None:
        return self._read(PROGRESS, Progress)

    def write_progress(self, progress: Progress) -> None:
        self._write(PROGRESS, progress.model_dump_json())

    def finish(self, facts: OutputFacts) -> None:
        self._write(FACTS, facts.model_dump_json(indent=2))
        self._there.rm_file(self._at(PROGRESS))

    def finished(self, plan: str) -> OutputFacts | None:
        """The facts, if all is there; None: there is work to do.

        Raises:
            UserError: what is there is something else, or not whole any more.
        """
        facts = self._read(FACTS, OutputFacts)
        if facts is None:
            return None
        remedy = f"name another --output, or delete {self._address}/{FACTS} and {self._address}/{FOLDER}"
        if facts.plan != plan:
            count = len(facts.shards)
            raise UserError(
                f"{self._address} holds {count} finished shards of other inputs, another column or other settings: "
                f"{remedy}"
            )
        for shard in facts.shards:
            if (size := self.size(shard.path)) != shard_bytes(shard.tokens):
                there = "is missing" if size is None else f"has {size:,} bytes, not {shard_bytes(shard.tokens):,}"
                raise UserError(f"{self._address} was finished, and now {shard.path} {there}: {remedy}")
        return facts

    def _read(self, name: str, model: type[M]) -> M | None:
        try:
            return model.model_validate_json(self._there.cat_file(self._at(name)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{self._address}/{name} is not a valid {model.__name__} (cut off?): bring it back, or delete it and "
                f"run again, and the shards there are made anew"
            ) from error

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all."""
        self._there.pipe_file(self._at(f"{name}.tmp"), text.encode())
        self._there.mv(self._at(f"{name}.tmp"), self._at(name))
