"""Configuration of the machine: *how* to run. Never hashed; "auto" is resolved on the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gpt2.config.section import Count, Section

Auto = Literal["auto"]
Processes = Annotated[int, Field(gt=0, le=4096)]


class Runtime(Section):
    """Settings that change results by rounding at most."""

    store: Path = Field(
        default_factory=lambda: Path("store").absolute(),
        validate_default=False,  # strict JSON validation accepts text only
        description="folder of all stages' directories",
    )
    gpus: Annotated[int, Field(ge=0, le=4096)] | Auto = "auto"
    processes: Annotated[Processes, Field(description="training processes without GPUs")] = 1
    micro_batch_size: Annotated[Count | Auto, Field(description="sequences per forward pass and process")] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool | Auto = "auto"
    sharding: Literal["auto", "ddp", "zero1", "fsdp"] = "auto"
    activation_checkpointing: bool | Auto = "auto"
    kernels: Annotated[
        Literal["auto", "reference"], Field(description="reference: PyTorch operations, no fused kernels")
    ] = "auto"
    deterministic: Annotated[
        bool | Auto,
        Field(description="bit-equal when repeated or resumed on the same machine; auto: on CPUs, at no cost"),
    ] = "auto"
    tokenize_workers: Processes | Auto = "auto"
    tokenize_backend: Literal["auto", "tiktoken"] = "auto"
    cluster: Annotated[
        str | None,
        Field(description="Dask scheduler (tcp://host:8786) whose workers tokenize, or local:N to start N processes"),
    ] = None
    cluster_parts: Annotated[
        str | None,
        Field(description="folder or address that all workers can write, for encoded parts; None: in the store"),
    ] = None
    download_workers: Processes = 8
    log_every: Count = 10
    verify: Annotated[
        bool,
        Field(description="hash every local source and every file of a cached stage, not only touched files"),
    ] = False
    upload_seconds: Annotated[
        Count | Auto,
        Field(description="limit for logging the model to MLflow; auto: 300 s plus 1 s per 4 MB of weights"),
    ] = "auto"
    nodes: Processes = 1
    rendezvous: Annotated[str | None, Field(description="host:port of the c10d rendezvous, for nodes > 1")] = None

    @field_validator("store")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if "\0" in str(value):
            raise ValueError("a path cannot contain NUL: remove it")
        try:
            return value.expanduser().absolute()
        except RuntimeError as error:  # ~user of an unknown user
            raise ValueError(f"{error}") from error
