"""report.md: the template report.md.jinja, in which every value is escaped unless it already is `Markdown`.

Sample texts come from a model and names from a configuration; neither can add markup, end a fence or a table cell, or
insert characters that change the layout around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# control characters, lone surrogates, direction overrides, line separators and non-characters
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff\u2028\u2029]")
# an underscore between letters or digits is no markup; an ampersand only begins an entity before a name and a semicolon
_MARKUP = re.compile(r"[\\`*\[\]<>|#~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
_LIST_ITEM = re.compile(r"^(\d*)([-+.)])(?=\s|$)")


class Markdown(str):
    """Text that a template inserts without escaping it."""


def visible(text: str) -> str:
    """Replaces control characters with their pictures (U+2400 and on) and other unshowable characters with U+FFFD.

    Line ends become newlines; tabs stay.
    """
    return _UNSHOWABLE.sub(_picture, text.replace("\r\n", "\n").replace("\r", "\n"))


def _picture(match: re.Match[str]) -> str:
    code_point = ord(match.group())
    return chr(0x2400 + code_point) if code_point < 0x20 else "\N{REPLACEMENT CHARACTER}"


def escape(value: Any) -> Markdown:
    """Escapes Markdown's special characters, joins lines and strips spaces; `Markdown` stays as it is."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_LIST_ITEM.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", _one_line(str(value)))))


def code(text: str) -> Markdown:
    """Inline code. Text in a table must not contain `|`."""
    line = _one_line(text)
    ticks = "`" * (1 + _longest_run(line))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{ticks}{space}{line}{space}{ticks}")


def codes(texts: Iterable[str]) -> Markdown:
    return Markdown(", ".join(code(text) for text in texts))


def fence(text: str, language: str = "text") -> Markdown:
    """A code block."""
    ticks = "`" * max(3, 1 + _longest_run(text))
    return Markdown(f"{ticks}{language}\n{visible(text)}\n{ticks}")


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False, strong: int | None = None
) -> Markdown:
    """A table.

    Args:
        numbers: aligns the columns after the first to the right.
        strong: index of the column in bold.
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    lines: list[Iterable[str]] = [map(escape, head), rule]
    for row in rows:
        cells = enumerate(map(escape, row))
        lines.append(f"**{cell}**" if index == strong and cell else cell for index, cell in cells)
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def render(name: str, modules: Iterable[ModuleType], **values: Any) -> str:
    """Renders a template of this package, which may call the functions of this module and of `modules`."""
    environment = Environment(  # noqa: S701  `finalize` escapes every value for Markdown
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, finalize=escape,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    for module in modules:
        environment.globals.update(vars(module))
    environment.globals.update(code=code, fence=fence, table=table)
    return environment.get_template(name).render(values)


def _one_line(text: str) -> str:
    return re.sub("[ \t\n]+", " ", visible(text)).strip(" ")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
