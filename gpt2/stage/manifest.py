"""What a stage was asked (Request) and what it made (Manifest): the only things that travel between stages.

A stage's *address* is `<stage>/<fingerprint>`. The fingerprint hashes the stage's name, its version, its section of
the configuration and the addresses of its inputs, so every address is known before anything runs, and does not
depend on where the store lies or on what machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gpt2.atomic import write_text
from gpt2.config.section import Section
from gpt2.errors import UserError
from gpt2.stage.facts import Facts, RelativePath
from gpt2.stage.file_hashes import Hashes, Stamp, sha256_file
from gpt2.version import code_version

M = TypeVar("M", bound=BaseModel)  # 3.11 has no def f[M]()

REQUEST, RUNTIME, INPUTS, METRICS, PROVENANCE, MANIFEST = (
    "request.json",
    "runtime.json",
    "inputs.json",
    "metrics.jsonl",
    "provenance.json",
    "manifest.json",
)


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no NaN. What fingerprints are taken of."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def confined(directory: Path, relative: str) -> Path:
    """`relative` in `directory`, to be changed or deleted.

    Raises:
        UserError: a link leads it out of the directory.
    """
    path = directory / relative
    if not path.parent.resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"{path} lies in {path.parent.resolve()}, outside of {directory}: delete it there if it is yours"
        )
    return path


class Request(Section):
    """What one stage is asked to do; request.json in its directory."""

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, RelativePath] = {}
    """role -> address, e.g. {"shards": "tokenize/0f3a..."}"""
    hints: dict[str, Any] = {}
    """where things lie on this machine, such as the paths of local files; not part of the address"""

    @property
    def address(self) -> str:
        identity = canonical(self.model_dump(mode="json", include={"stage", "version", "config", "inputs"}))
        return f"{self.stage}/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


class FileEntry(Section):
    path: RelativePath
    """relative to the stage's directory, with forward slashes"""
    size: int
    sha256: str
    mtime_ns: int
    """only tells whether hashing again is worth while, as the two below; never part of an identity"""
    inode: int | None = None
    ctime_ns: int | None = None
    """None: written by a version that recorded mtime_ns alone"""

    def touched(self, stamp: Stamp) -> bool:
        """Whether the file may hold something else than when it was recorded."""
        recorded = (self.inode, self.ctime_ns)
        return stamp.mtime_ns != self.mtime_ns or recorded not in ((None, None), (stamp.inode, stamp.ctime_ns))


class Manifest(Section):
    """manifest.json: the typed index of a finished stage's directory, and the one sign that it is finished."""

    address: str
    version: str | None = None
    """release and commit that wrote it; None where it recorded none"""
    inputs: dict[str, str] | None = None
    """role -> digest of the input's manifest, when the work began; None where the version recorded none"""
    files: tuple[FileEntry, ...]
    facts: Facts

    @property
    def digest(self) -> str:
        """Hash of the content: names, sizes and hashes of the files. A stage that is made again with the same bytes, or
        copied, keeps it; the address is the same for whatever bytes."""
        content = sorted([entry.path, entry.size, entry.sha256] for entry in self.files)
        return hashlib.sha256(canonical(content).encode()).hexdigest()

    def problems(self, directory: Path, *, deep: bool = False) -> list[str]:
        """What no longer agrees with the files under `directory`: missing, of another size, or, where mtime, ctime or
        inode changed (`deep`: always), of another hash. Empty when all is well.

        The hashes of changed files are remembered in the store, so that a copied store is read once.
        """
        found = []
        read: dict[Path, str] = {}
        for entry in self.files:
            path = (directory / entry.path).absolute()
            try:
                stamp = Stamp.of(path)
            except FileNotFoundError:
                found.append(f"{path}: missing")
                continue
            if stamp.size != entry.size:
                found.append(f"{path}: {stamp.size:,} bytes, the manifest says {entry.size:,}")
            elif deep or entry.touched(stamp):
                read[path] = entry.sha256
        hashes = Hashes(directory.parent.parent, verify=deep).of(list(read))
        changed = [path for (path, sha256), now in zip(read.items(), hashes, strict=True) if now != sha256]
        return found + [f"{path}: its sha256 is not the manifest's" for path in changed]


def file_entry(directory: Path, relative: str, sha256: str | None = None) -> FileEntry:
    """Measure one file of a stage's directory; `sha256` when it is known already."""
    path = directory / relative
    stamp = Stamp.of(path)  # before it is read: a later change shows
    return FileEntry(path=relative, sha256=sha256 or sha256_file(path), **stamp._asdict())


class Damaged(UserError):
    """A record that is not JSON: torn or overwritten."""


class OtherVersion(UserError):
    """A record that another version of this project wrote: it says nothing against the work it describes."""


def read_model(path: Path, model: type[M]) -> M:
    """Read one of our JSON records.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not JSON.
        OtherVersion: it is JSON, and not what this version writes.
    """
    content = path.read_bytes()
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise Damaged(f"{path} is damaged ({first['msg']}): delete it and run again") from error
        field = ".".join(str(part) for part in first["loc"]) or model.__name__
        writer = _writer(path, content)
        if writer == code_version():
            raise OtherVersion(
                f"{path}: {field}: {first['msg']}; the file was changed after this version wrote it: restore it, or "
                f"delete it to do this stage again"
            ) from error
        raise OtherVersion(
            f"{path}: {field}: {first['msg']}; version {writer} wrote it, this is {code_version()}: use that version, "
            f"or another store (runtime.store), or delete the file to do this stage again"
        ) from error


def _writer(path: Path, content: bytes) -> str:
    """The version that wrote a record: as it says, else the commit in the provenance.json beside it."""
    found = json.loads(content)
    if isinstance(found, dict) and isinstance(found.get("version"), str):
        return str(found["version"])[:60]
    try:
        return f"of commit {json.loads((path.parent / PROVENANCE).read_bytes())['commit'][:13]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def write_model(path: Path, model: BaseModel) -> None:
    write_text(path, model.model_dump_json(indent=2) + "\n")
