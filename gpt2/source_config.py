"""Where data comes from, as configuration: the base of every section, and the sources of a corpus.

Only pydantic here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

Count = Annotated[int, Field(gt=0, le=10**12)]
"""so small that a Count of 64-bit words, or a million times as many, has a size of 64 bits"""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
LocalPath = Annotated[str, Field(pattern=r"^[^\x00]+$")]
"""no system accepts NUL in a path"""


class Added:
    """Marks a field that was added to a section after addresses were handed out, as in
    `clip_tokens: Annotated[PositiveInt | None, ADDED] = None`. It is hashed where it differs from its default, so that
    existing addresses stay. Its default must never change: it is what the existing addresses mean."""


ADDED = Added()


class Section(BaseModel):
    """Base of every configuration: immutable, and a name it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """What addresses are hashed from: as JSON, without the `ADDED` fields that have their default, at any depth."""
        return {
            name: _identity(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if ADDED not in field.metadata or getattr(self, name) != field.get_default(call_default_factory=True)
        }


def _identity(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, dict):
        return {key: _identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    return to_jsonable_python(value)


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
    """Files on this machine: parquet, jsonl (also .gz, .zst) or txt. Identified by content, not by place."""

    kind: Literal["local"] = "local"
    paths: Annotated[tuple[LocalPath, ...], Field(min_length=1, description="paths or glob patterns, in reading order")]
    text_column: str = "text"


class HubShards(Section):
    """Ready-made token shards in llm.c's format from the Hub, e.g. kjj0/fineweb10B-gpt2."""

    kind: Literal["hub-shards"] = "hub-shards"
    repo: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    files: Annotated[tuple[str, ...], Field(min_length=1)] = ("*_val_*.bin", "*_train_*.bin")


class LocalShards(Section):
    """Ready-made token shards in llm.c's format on this machine; *_val_* is validation, the rest is training."""

    kind: Literal["local-shards"] = "local-shards"
    paths: Annotated[tuple[LocalPath, ...], Field(min_length=1)]


class InstalledDocs(Section):
    """English prose without a download: the docstrings of MLflow and Prefect, which the project pins. The same under
    every Python and with every other package; it changes with the two versions."""

    kind: Literal["installed-docs"] = "installed-docs"
    max_bytes: Count = 50_000_000


class HubModel(Section):
    """A GPT-2 on the Hugging Face Hub, e.g. openai-community/gpt2, at one pinned revision."""

    kind: Literal["hub-model"] = "hub-model"
    repo: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    files: Annotated[tuple[str, ...], Field(min_length=1)] = ("config.json", "model.safetensors")


class LocalModel(Section):
    """A GPT-2 in a Hugging Face folder on this machine. Identified by content, not by place."""

    kind: Literal["local-model"] = "local-model"
    path: LocalPath


ModelSource = Annotated[HubModel | LocalModel, Field(discriminator="kind")]
CorpusSource = Annotated[HubFiles | LocalFiles | HubShards | LocalShards | InstalledDocs, Field(discriminator="kind")]
