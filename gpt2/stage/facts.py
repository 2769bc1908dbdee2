"""Facts: the typed result of each stage, stored in its manifest."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gpt2.config.section import Section


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"{path[:100]!r} is not a path inside its directory")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
"""A path in a record, below the directory that it is relative to. Records are copied from machine to machine: no path
in one may lead elsewhere."""


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
