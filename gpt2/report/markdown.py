"""A report as Markdown, with its plots as files beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gpt2.report.document import (
    Block,
    Code,
    Document,
    Gallery,
    Listing,
    Paragraph,
    Passage,
    Points,
    Table,
    Text,
    parts,
)
from gpt2.report.text import visible

_MARKUP = re.compile(r"([\\`*_\[\]<>|#~])")


def render(document: Document, pictures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        pictures: name of a plot -> its path, relative to the page.
    """
    lines = [f"# {_inline(document.title)}", "", _inline(document.subtitle), ""]
    tiles = Table(["", "", ""], [[tile.label, tile.value, tile.beside] for tile in document.tiles], strong=1)
    lines += [*_table(tiles), "", _inline(document.lead), ""]
    for chapter in document.chapters:
        lines += [f"## {_inline(chapter.title)}", ""]
        for block in chapter.blocks:
            lines += [*_block(block, pictures), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _block(block: Block, pictures: Mapping[str, str]) -> list[str]:
    match block:
        case Paragraph():
            return [_inline(block.text)]
        case Points():
            return [f"- {_inline(item)}" for item in block.items]
        case Table():
            return _table(block)
        case Listing():
            folded = [f"{block.folded}:", ""] if block.folded else []
            return [*folded, *_fenced(block.text.rstrip("\n"))]
        case Passage():
            prompt = f", after {_code(block.prompt)}" if block.prompt else ""
            return [f"**{_inline(block.heading)}**{prompt}", "", *_fenced(block.text)]
        case Gallery():
            lines: list[str] = []
            for picture in block.pictures:
                lines += [f"![{_inline(picture.title)}]({pictures[picture.name]})", "", _inline(picture.caption), ""]
            return lines[:-1]


def _table(table: Table) -> list[str]:
    width = len(table.head)
    rule = ["---:" if table.numbers and column else "---" for column in range(width)]
    lines = ["| " + " | ".join(_inline(cell) for cell in table.head) + " |", "|" + "|".join(rule) + "|"]
    for row in table.rows:
        cells = [_inline(cell) for cell in row]
        if table.strong is not None and cells[table.strong]:
            cells[table.strong] = f"**{cells[table.strong]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _inline(text: Text) -> str:
    return "".join(_code(part) if isinstance(part, Code) else _escaped(part) for part in parts(text))


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(visible(text).split("\n")))


def _code(text: str) -> str:
    """Inline code; more backticks around it than it holds. A bar would end a table's cell even here."""
    shown = " ".join(visible(text).split("\n")).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def _fenced(text: str) -> list[str]:
    shown = visible(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return [f"{fence}text", *shown.split("\n"), fence]
