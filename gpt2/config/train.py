"""Configuration of training: model, optimizer, batch, validation, samples, checkpoints and anomalies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from gpt2.config.section import Count, LocalPath, Section, Seed

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Steps = Annotated[int, Field(gt=0, le=10**9)]
LAYER_NORM_EPS = 1e-5
"""of GPT-2 in every size"""


class ModelConfig(Section):
    """GPT-2's architecture, with the field names of GPT-2's config. Dropout is 0."""

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
        """vocab_size rounded up to a multiple of 128, for tensor cores; the added rows are zero and never scored."""
        return -(-self.vocab_size // 128) * 128

    def n_params(self) -> int:
        """Trainable parameters without padding: 124,439,808 for GPT-2 124M. The head is tied to wte."""
        c = self.n_embd
        block = 12 * c * c + 13 * c  # qkv 3cc+3c, proj cc+c, fc 4cc+4c, proj 4cc+c, two LayerNorms 4c
        return self.vocab_size * c + self.block_size * c + self.n_layer * block + 2 * c


class OptimConfig(Section):
    """AdamW and the learning-rate schedule (llm.c: scripts/run_gpt2_124M.sh)."""

    max_lr: PositiveFloat
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 700
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: Annotated[
        Fraction, Field(description="wsd only: last fraction of the steps, with linear decay")
    ] = 0.2
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
    tokens: Annotated[Count, Field(description="from the start of the validation shard")] = 10_485_760


class SampleConfig(Section):
    """Text samples during training; the empty prompt is `<|endoftext|>` alone."""

    every: Count = 20_000
    tokens: Count = 64
    prompts: tuple[str, ...] = ("",)
    temperature: PositiveFloat = 1.0
    top_k: Count | None = 50


class CheckpointConfig(Section):
    every: Count = 5_000
    keep_last: Annotated[Count, Field(description="newest checkpoints to keep; 2 or more survive a damaged one")] = 2
    keep_every: Annotated[Count | None, Field(description="also keep each step divisible by this")] = None


class AnomalyConfig(Section):
    """Action on a loss or gradient norm that is not finite or jumps (z-score over a window)."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = "warn"
    window: Count = 128
    loss_z: PositiveFloat = 6.0
    grad_z: PositiveFloat = 6.0
    max_skips: Annotated[Count, Field(description="stop after this many skipped or rolled-back steps")] = 10


class TrainConfig(Section):
    model: ModelConfig
    optim: OptimConfig
    total_batch_size: Annotated[int, Field(gt=0, le=2**31, description="tokens per optimizer step, over all GPUs")] = (
        524_288
    )
    max_steps: Steps
    seed: Seed = 42
    shuffle: Annotated[bool, Field(description="permute all sequences in each epoch; else file order")] = True
    align_documents: Annotated[bool, Field(description="every sequence begins with a document")] = False
    fp8_head: Annotated[
        bool,
        Field(description="compute the head in FP8 if the GPU supports it: faster, with coarser rounding"),
    ] = False
    val: ValConfig = ValConfig()
    benchmark: Annotated[str | None, Field(description="name under `benchmarks` to score while training")] = None
    benchmark_every: Count = 250
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    anomalies: AnomalyConfig = AnomalyConfig()
    init_from: Annotated[
        LocalPath | None,
        Field(description="folder with a Hugging Face or llm.c GPT-2; None: random initialization"),
    ] = None
    init_sha256: Annotated[
        str | None, Field(description="of the weights in init_from; set by the plan, or given to pin them")
    ] = None

    @model_validator(mode="after")
    def _batch_and_warmup_fit(self) -> TrainConfig:
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
