"""Configuration of data sources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gpt2.config.section import Count, LocalPath, Section


class HubFiles(Section):
    """Parquet or JSON-lines files of a Hugging Face Hub data set, at one pinned revision."""

    kind: Literal["hub"] = "hub"
    repo: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="40-digit commit; a branch name can move")]
    files: Annotated[
        tuple[str, ...], Field(min_length=1, description="glob patterns inside the repository, in reading order")
    ]
    text_column: str = "text"


class LocalFiles(Section):
    """Local files: parquet, jsonl (also .gz, .zst) or txt. Identified by content, not by path."""

    kind: Literal["local"] = "local"
    paths: Annotated[tuple[LocalPath, ...], Field(min_length=1, description="paths or glob patterns, in reading order")]
    text_column: str = "text"


class HubShards(Section):
    """Token shards in llm.c's format from the Hub, e.g. kjj0/fineweb10B-gpt2."""

    kind: Literal["hub-shards"] = "hub-shards"
    repo: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    files: Annotated[tuple[str, ...], Field(min_length=1)] = ("*_val_*.bin", "*_train_*.bin")


class LocalShards(Section):
    """Local token shards in llm.c's format; *_val_* are for validation, the others for training."""

    kind: Literal["local-shards"] = "local-shards"
    paths: Annotated[tuple[LocalPath, ...], Field(min_length=1)]


class InstalledDocs(Section):
    """The docstrings of MLflow and Prefect, which the project pins: English prose without a download."""

    kind: Literal["installed-docs"] = "installed-docs"
    max_bytes: Count = 50_000_000


class HubModel(Section):
    """A GPT-2 on the Hugging Face Hub, e.g. openai-community/gpt2, at one pinned revision."""

    kind: Literal["hub-model"] = "hub-model"
    repo: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    files: Annotated[tuple[str, ...], Field(min_length=1)] = ("config.json", "model.safetensors")


class LocalModel(Section):
    """A GPT-2 in a local Hugging Face folder. Identified by content, not by path."""

    kind: Literal["local-model"] = "local-model"
    path: LocalPath


ModelSource = Annotated[HubModel | LocalModel, Field(discriminator="kind")]
CorpusSource = Annotated[HubFiles | LocalFiles | HubShards | LocalShards | InstalledDocs, Field(discriminator="kind")]
