"""A report as a document, before it is Markdown or HTML: both renderers take the same blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class Code(str):
    """Inline text in type of fixed width: a path, an address, a field's name."""


Text = str | tuple[str, ...]
"""Plain text; in a tuple, some of the parts may be Code. Never markup: renderers escape every character."""


def parts(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    label: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Paragraph:
    text: Text


@dataclass(frozen=True)
class Points:
    """An unordered list."""

    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    head: Sequence[Text]
    rows: Sequence[Sequence[Text]]
    numbers: bool = False
    """whether the columns after the first hold numbers, set to the right"""
    strong: int | None = None
    """index of a column to stand out"""


@dataclass(frozen=True)
class Listing:
    """Lines to be copied, character by character."""

    text: str
    folded: str | None = None
    """where it is long: the line behind which it is folded away"""


@dataclass(frozen=True)
class Passage:
    """Text that a model wrote; may hold any character."""

    heading: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A plot, by its name in plots/."""

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Plots that may stand side by side."""

    pictures: Sequence[Picture]


Block = Paragraph | Points | Table | Listing | Passage | Gallery


@dataclass(frozen=True)
class Chapter:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: Text
    tiles: Sequence[Tile]
    lead: str
    chapters: Sequence[Chapter] = field(default_factory=tuple)
