"""What a stage was asked (Request) and what it made (Manifest): the only things that travel between stages.

A stage's *address* is `<stage>/<fingerprint>`. The fingerprint hashes the stage's name, its version, its section of
the configuration and the addresses of its inputs, so every address is known before anything runs, and does not
depend on where the store lies or on what machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from gpt2.atomic import write_text
from gpt2.config.section import Section
from gpt2.errors import UserError
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


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"{path[:100]!r} is not a path inside its directory")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
"""A path in a record, below the directory that it is relative to. Records are copied from machine to machine: no path
in one may lead elsewhere."""


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


# ------------------------------------------------------------------------------------------ facts, one model a stage


class DownloadFacts(Section):
    stage: Literal["download"] = "download"
    kind: str
    """of the source: hub, local, hub-shards, local-shards, installed-docs"""
    text_column: str | None
    files: tuple[RelativePath, ...]
    """relative paths of the data files in reading order"""
    total_bytes: int
    origin: str
    """for people: repository@revision, or where the files came from"""


class Skipped(Section):
    """Input that could not be used, when the configuration says to go on without it."""

    file: str
    row_group: int | None = None
    rows: int
    reason: str


class ShardEntry(Section):
    path: RelativePath
    split: Literal["val", "train"]
    tokens: int


class TokenizeFacts(Section):
    stage: Literal["tokenize"] = "tokenize"
    tokenizer: str
    backend: str
    """which encoder made the ids and its version, e.g. "c-kernel, checked against tiktoken 0.14.0" """
    documents: int | None
    """None for ready-made shards that were adopted"""
    train_tokens: int
    val_tokens: int
    shards: tuple[ShardEntry, ...]
    skipped: tuple[Skipped, ...] = ()


class BenchmarkFacts(Section):
    stage: Literal["benchmark"] = "benchmark"
    kind: str
    examples: int
    chance: float | None
    """accuracy of guessing; None where there is nothing to guess"""
    origin: str
    left_out: dict[str, str] = {}
    """tasks that belong to it and that its data lacks -> why"""


class Session(Section):
    """A stretch of training on the same devices."""

    device: str
    """as the driver names it, or "cpu" """
    processes: int
    """one per GPU"""
    seconds: float
    """wall time, everything counted"""

    @property
    def devices(self) -> str:
        """E.g. "8 x NVIDIA A100-SXM4-80GB" or "cpu"."""
        return self.device if self.processes == 1 else f"{self.processes} x {self.device}"

    @property
    def gpus(self) -> int:
        return 0 if self.device == "cpu" else self.processes


class TrainFacts(Section):
    stage: Literal["train"] = "train"
    steps: int
    tokens: int
    n_params: int
    train_loss: float
    """mean over the last 1 % of steps (at least one), nats a token"""
    val_loss: float
    """of the final weights, on the configured validation tokens"""
    train_seconds: float
    """inside optimizer steps, over all sessions; validation, benchmarks and checkpoints not counted"""
    total_seconds: float
    """of all sessions, everything counted"""
    sessions: tuple[Session, ...] = ()
    """in order, consecutive ones on the same devices as one; empty in manifests of before this field"""
    tokens_per_second: float
    """median over logged lines"""
    flops_per_token: float
    mfu: float | None
    """median over logged lines, or None where the peak of no device is known"""
    device: str
    """all devices that trained, e.g. "8 x NVIDIA A100-SXM4-80GB, 1 x NVIDIA L4" or "cpu" """
    world_size: int
    """processes of the last session"""
    precision: str
    fp8_head: bool = False
    """whether the last part of the training made the head's products in 8-bit floats"""
    checkpoint: RelativePath
    """relative path of the final checkpoint's folder"""

    @property
    def arithmetic(self) -> str:
        """The precision and what departed from it, in words."""
        return f"{self.precision}, head in fp8" if self.fp8_head else self.precision

    def all_sessions(self) -> tuple[Session, ...]:
        """`sessions`; where they are not recorded, one on the devices of the last."""
        name = self.device.removeprefix(f"{self.world_size} x ")
        return self.sessions or (Session(device=name, processes=self.world_size, seconds=self.total_seconds),)

    @property
    def gpu_seconds(self) -> float:
        """Wall time x GPUs, summed over sessions; 0 on CPUs."""
        return sum(session.gpus * session.seconds for session in self.all_sessions())


class PretrainedFacts(Section):
    """Of weights that others trained, fetched to be measured."""

    stage: Literal["pretrained"] = "pretrained"
    origin: str
    checkpoint: RelativePath
    """relative path of the folder that holds config.json and the weights"""


class Score(Section):
    """What one benchmark gave. A figure that its form of question does not have is None; `figures` leaves those out."""

    acc: float | None = None
    """share of examples answered rightly: the highest summed log probability, or every token the greedy one"""
    acc_norm: float | None = None
    """multiple choice by mean instead of summed log probability of the ending's tokens (llm.c's acc_norm)"""
    acc_norm_chars: float | None = None
    """by log probability a character of the ending: what lm-evaluation-harness calls acc_norm"""
    acc_norm_bytes: float | None = None
    """by log probability a byte of the ending: what lm-evaluation-harness calls acc_bytes"""
    perplexity: float | None = None
    """exp of the negative log probability a unit; `unit` says of what"""
    unit: str | None = None
    centered: float | None = None
    """CORE: mean over its tasks of (accuracy - chance) / (1 - chance)"""
    examples: int
    chance: float | None = None
    """accuracy of guessing; None where there is none to guess"""
    truncated: int = 0
    """sequences longer than the model's context, scored with the left end of their context cut off"""
    parts: dict[str, Score] = {}
    """of a benchmark made of several tasks"""
    prompt: str = ""
    """how the text is put to the model, e.g. "llm.c" or "harness" """

    def figures(self) -> dict[str, float]:
        """The measured numbers by name, for metrics and tables: acc, acc_norm, perplexity, ..."""
        names = ("acc", "acc_norm", "acc_norm_chars", "acc_norm_bytes", "perplexity", "centered")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class EvaluateFacts(Section):
    stage: Literal["evaluate"] = "evaluate"
    val_loss: float
    val_tokens: int
    """used: fewer than asked when the validation shards hold fewer"""
    scores: dict[str, Score] = {}
    skipped: dict[str, str] = {}
    """benchmarks that were asked for and could not be had -> why"""
    precision: str = "fp32"


class HarnessFacts(Section):
    """What lm-evaluation-harness itself measured."""

    stage: Literal["harness"] = "harness"
    version: str
    """of lm-evaluation-harness"""
    figures: dict[str, dict[str, float]]
    """task -> metric, by the harness's own names -> value"""
    examples: dict[str, int] = {}
    """task -> examples asked"""


class ReportFacts(Section):
    stage: Literal["report"] = "report"
    headline: dict[str, float | str | None] = {}


Facts = Annotated[
    DownloadFacts
    | TokenizeFacts
    | BenchmarkFacts
    | TrainFacts
    | PretrainedFacts
    | EvaluateFacts
    | HarnessFacts
    | ReportFacts,
    Field(discriminator="stage"),
]


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
        raise OtherVersion(
            f"{path}: {field}: {first['msg']}; version {_writer(path, content)} wrote it, this is {code_version()}: "
            f"use that version, or another store (runtime.store), or delete the file to do this stage again"
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
