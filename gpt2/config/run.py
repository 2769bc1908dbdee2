"""What is trained and how: the typed configuration of a run.

Two trees that never share a section. `RunConfig` says *what*: it is read from conf/<name>.yaml, and each of its
sections is hashed into the address of the stage it belongs to. `Runtime` says *how*, on what machine: it is never
hashed, and "auto" in it means "look at the machine".

This package imports pydantic only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from gpt2.config.benchmarks import BenchmarkConfig
from gpt2.config.section import ADDED, Count, LocalPath, Section, Seed
from gpt2.config.sources import CorpusSource, ModelSource

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Auto = Literal["auto"]
Steps = Annotated[int, Field(gt=0, le=10**9)]
Processes = Annotated[int, Field(gt=0, le=4096)]
ShardTokens = Annotated[int, Field(gt=0, lt=2**31, description="llm.c's header has 32 bits for it")]
LAYER_NORM_EPS = 1e-5
"""GPT-2's, in every size"""


# ------------------------------------------------------------------------------------------------------------- data


class DownloadConfig(Section):
    source: CorpusSource


class TokenizeConfig(Section):
    """How text becomes token shards. The defaults are llm.c's: shard 0 is validation, 100M tokens a shard."""

    tokenizer: Literal["gpt2"] = "gpt2"
    prefix: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] = "fineweb"
    shard_tokens: ShardTokens = 100_000_000
    val_tokens: Annotated[ShardTokens | None, Field(description="tokens of shard 0; None: shard_tokens")] = None
    on_bad_input: Annotated[
        Literal["error", "skip"],
        Field(description="a row group that cannot be read, a null or non-string row: stop, or skip and list it"),
    ] = "error"
    max_document_bytes: Annotated[
        Count | None,
        ADDED,
        Field(description="of UTF-8 in a parquet row or a jsonl line; a longer one is bad input. txt is read in parts"),
    ] = None


# --------------------------------------------------------------------------------------------------------- training


class ModelConfig(Section):
    """GPT-2's architecture, in GPT-2's own names. Dropout is 0, as in every recipe here."""

    n_layer: Annotated[int, Field(gt=0, le=1024)]
    n_head: Annotated[int, Field(gt=0, le=1024)]
    n_embd: Annotated[int, Field(gt=0, le=65_536)]
    block_size: Annotated[int, Field(gt=0, le=2**20)] = 1024
    vocab_size: Annotated[int, Field(gt=0, le=2**16, description="shards hold 16-bit tokens")] = 50257

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: "
                f"use {self.n_embd // self.n_head * self.n_head} or another number of heads"
            )
        return self

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128, for the matrix units; the added rows are zero, never scored."""
        return -(-self.vocab_size // 128) * 128

    def n_params(self) -> int:
        """Trainable parameters with the real vocabulary: 124,439,808 for GPT-2 124M. The head is tied to wte."""
        c = self.n_embd
        block = 12 * c * c + 13 * c  # qkv 3cc+3c, proj cc+c, fc 4cc+4c, proj 4cc+c, two LayerNorms 4c
        return self.vocab_size * c + self.block_size * c + self.n_layer * block + 2 * c


class OptimConfig(Section):
    """AdamW and its schedule (llm.c's recipe: scripts/run_gpt2_124M.sh)."""

    max_lr: PositiveFloat
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 700
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: Annotated[Fraction, Field(description="wsd only: the last part of the steps decays linearly")] = 0.2
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    grad_clip: Annotated[PositiveFloat | None, Field(description="largest global gradient norm; None: no clipping")] = (
        1.0
    )

    @model_validator(mode="after")
    def _floor_below_peak(self) -> OptimConfig:
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr {self.min_lr} is above max_lr {self.max_lr}: lower min_lr")
        return self


class ValConfig(Section):
    every: Count = 250
    tokens: Annotated[Count, Field(description="the first so many tokens of the validation shard")] = 10_485_760


class SampleConfig(Section):
    """Text samples written during training, from `<|endoftext|>` alone or from a prompt."""

    every: Count = 20_000
    tokens: Count = 64
    prompts: tuple[str, ...] = ("",)
    temperature: PositiveFloat = 1.0
    top_k: Count | None = 50


class CheckpointConfig(Section):
    every: Count = 5_000
    keep_last: Annotated[Count, Field(description="the newest so many are kept; 2 or more survive a damaged one")] = 2
    keep_every: Annotated[Count | None, Field(description="also keep each step divisible by this")] = None


class AnomalyConfig(Section):
    """What to do when a loss or gradient is not finite, or jumps (z-score over a window)."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = "warn"
    window: Count = 128
    loss_z: PositiveFloat = 6.0
    grad_z: PositiveFloat = 6.0
    max_skips: Annotated[Count, Field(description="stop after so many steps skipped or rolled back")] = 10


class TrainConfig(Section):
    model: ModelConfig
    optim: OptimConfig
    total_batch_size: Annotated[int, Field(gt=0, le=2**31, description="tokens per optimizer step, over all GPUs")] = (
        524_288
    )
    max_steps: Steps
    seed: Seed = 42
    shuffle: Annotated[
        bool, Field(description="a fresh permutation of all sequences each epoch; else in file order")
    ] = True
    align_documents: Annotated[bool, Field(description="every sequence begins at a document's start")] = False
    fp8_head: Annotated[
        bool,
        Field(description="the head's products in 8-bit floats where the GPU has them: faster; far coarser rounding"),
    ] = False
    val: ValConfig = ValConfig()
    benchmark: Annotated[str | None, Field(description="name under `benchmarks` to score while training")] = None
    benchmark_every: Count = 250
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    anomalies: AnomalyConfig = AnomalyConfig()
    init_from: Annotated[
        LocalPath | None,
        Field(description="folder with a Hugging Face or llm.c GPT-2 to start from instead of random weights"),
    ] = None
    init_sha256: Annotated[
        str | None, Field(description="of what init_from holds; filled in by the plan, or given to pin it")
    ] = None

    @model_validator(mode="after")
    def _arithmetic(self) -> TrainConfig:
        if self.total_batch_size % self.model.block_size:
            down = self.total_batch_size // self.model.block_size * self.model.block_size
            raise ValueError(
                f"total_batch_size {self.total_batch_size:,} tokens is not a multiple of block_size "
                f"{self.model.block_size:,}: use {down or self.model.block_size:,}"
            )
        if self.optim.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps {self.optim.warmup_steps:,} does not end before max_steps {self.max_steps:,}: "
                f"lower optim.warmup_steps or raise max_steps"
            )
        return self

    @property
    def sequences_per_step(self) -> int:
        return self.total_batch_size // self.model.block_size


# ----------------------------------------------------------------------------------------------- evaluation, report


class EvaluateConfig(Section):
    val_tokens: Count = 10_485_760
    benchmarks: Annotated[tuple[str, ...], Field(description="names under `benchmarks`")] = ()


class HarnessConfig(Section):
    """EleutherAI's lm-evaluation-harness itself, on the finished model, for what `benchmarks` does not know."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1, description="the harness's names, such as arc_easy")]
    data: Annotated[
        dict[str, LocalPath],
        Field(description="task -> local file (jsonl, parquet) of its examples, instead of the Hub"),
    ] = {}
    limit: Annotated[Count | None, Field(description="of each task, only so many examples")] = None

    @model_validator(mode="after")
    def _data_is_for_tasks(self) -> HarnessConfig:
        for task in self.data:
            if task not in self.tasks:
                raise ValueError(f"data names {task!r}, but tasks has only {sorted(self.tasks)}")
        return self


class Published(Section):
    """Figures somebody else published for this recipe, with where they stand; drawn beside ours."""

    name: str
    source: str
    val_loss: float | None = None
    hellaswag_acc_norm: float | None = None
    core: Annotated[float | None, Field(description="DCLM's CORE as nanochat evaluates it")] = None
    hours: float | None = None
    dollars: float | None = None
    gpus: str | None = None
    note: Annotated[str | None, Field(description="what keeps it from being compared, e.g. other validation text")] = (
        None
    )


class ReportConfig(Section):
    title: str
    dollars_per_gpu_hour: Annotated[float, Field(ge=0.0, description="0 leaves the cost out")] = 0.0
    published: tuple[Published, ...] = ()


class RunConfig(Section):
    """All of *what*: one conf/<name>.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="of the recipe; names the MLflow run")]
    download: DownloadConfig
    tokenize: TokenizeConfig = TokenizeConfig()
    benchmarks: dict[str, BenchmarkConfig] = {}
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    harness: Annotated[HarnessConfig | None, Field(description="needs pip install 'reproduce-gpt2[harness]'")] = None
    baselines: Annotated[
        dict[str, ModelSource], Field(description="models of others, by a name for people, to be measured as ours is")
    ] = {}
    report: ReportConfig

    @model_validator(mode="after")
    def _benchmarks_exist(self) -> RunConfig:
        wanted = [("train.benchmark", self.train.benchmark)] if self.train.benchmark else []
        wanted += [("evaluate.benchmarks", name) for name in self.evaluate.benchmarks]
        for field, name in wanted:
            if name not in self.benchmarks:
                raise ValueError(f"{field} names {name!r}, but benchmarks has only {sorted(self.benchmarks)}")
        return self


# ---------------------------------------------------------------------------------------------------------- runtime


class Runtime(Section):
    """All of *how*. Nothing here may change what is computed beyond rounding; none of it is hashed."""

    store: Path = Field(
        default_factory=lambda: Path("store").absolute(),
        validate_default=False,  # in JSON, a path is text
        description="where every stage's directory lives",
    )
    gpus: Annotated[int, Field(ge=0, le=4096)] | Auto = "auto"
    processes: Annotated[Processes, Field(description="training processes where there is no GPU")] = 1
    micro_batch_size: Annotated[Count | Auto, Field(description="sequences per forward pass and process")] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool | Auto = "auto"
    sharding: Literal["auto", "ddp", "zero1", "fsdp"] = "auto"
    activation_checkpointing: bool | Auto = "auto"
    kernels: Annotated[
        Literal["auto", "reference"], Field(description="reference: the plain path, no fused kernels")
    ] = "auto"
    deterministic: Annotated[
        bool | Auto,
        Field(description="bit-equal when repeated or resumed on the same machine; auto: on a CPU, where it is free"),
    ] = "auto"
    tokenize_workers: Processes | Auto = "auto"
    tokenize_backend: Literal["auto", "tiktoken"] = "auto"
    cluster: Annotated[
        str | None,
        Field(description="Dask scheduler (tcp://host:8786) whose workers tokenize, or local:N to start N processes"),
    ] = None
    cluster_parts: Annotated[
        str | None,
        Field(description="folder or address that all workers can write, for what they hand over; None: in the store"),
    ] = None
    download_workers: Processes = 8
    log_every: Count = 10
    verify: Annotated[
        bool,
        Field(description="hash every local source and every file of a cached stage, not only those touched since"),
    ] = False
    upload_seconds: Annotated[
        Count | Auto,
        Field(description="limit for logging the model to MLflow; auto: 300 s and 1 s per 4 MB of weights"),
    ] = "auto"
    nodes: Processes = 1
    rendezvous: Annotated[str | None, Field(description="host:port of the c10d rendezvous, for nodes > 1")] = None

    @field_validator("store")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if "\0" in str(value):
            raise ValueError("a path holds no NUL: remove it")
        try:
            return value.expanduser().absolute()
        except RuntimeError as error:  # ~user of a user that does not exist
            raise ValueError(f"{error}") from error
