"""The base class of every configuration section and record, and the types that their fields share."""

from __future__ import annotations

from typing import Annotated, Any

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
