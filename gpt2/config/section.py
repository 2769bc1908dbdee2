"""The base class of configuration sections and records, and shared field types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

Count = Annotated[int, Field(gt=0, le=10**12)]
"""bounded, so that a million times a Count of 64-bit words still fits in 64 bits"""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
LocalPath = Annotated[str, Field(pattern=r"^[^\x00]+$")]
"""a path cannot contain NUL"""


class Added:
    """Marks a field that was added to a section later: `clip_tokens: Annotated[PositiveInt | None, ADDED] = None`.

    It is hashed only if it differs from its default, which keeps existing addresses. So its default must never change.
    """


ADDED = Added()


class Section(BaseModel):
    """Base of every configuration: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The JSON that addresses hash: without `ADDED` fields that have their default, at any depth."""
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
