"""report.html: report.md rendered with markdown-it-py into page.html.jinja.

The page loads nothing: plots are inline SVG, and its security policy forbids every request. Raw HTML in the Markdown
is escaped. The page follows the reader's light or dark theme, fits a phone, and prints in light colours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token


def render(markdown: str, title: str, plots: Mapping[str, str]) -> str:
    """The page.

    Args:
        plots: image path in the Markdown -> <svg> element.
    """
    parser = MarkdownIt("js-default", {"html": False})  # CommonMark with tables
    for rule in (image, fence):
        parser.add_render_rule(rule.__name__, rule)
    env = {"plots": plots}
    body = parser.renderer.render(_with_html_structure(parser.parse(markdown)), parser.options, env)
    body = body.replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return templates.get_template("page.html.jinja").render(title=title, body=body)


def _with_html_structure(tokens: Sequence[Token]) -> list[Token]:
    """Adds what Markdown cannot express: anchors, row headers, table classes, and figures with captions."""
    result = list(tokens)
    tiles = next(token for token in tokens if token.type == "table_open")
    for index, token in enumerate(result):
        following = result[index + 1 : index + 2]
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", re.sub("[^a-z0-9]+", "-", following[0].content.lower()).strip("-"))
        elif token.type == "table_open":
            head = result[index : next(i for i in range(index, len(result)) if result[i].type == "thead_close")]
            columns = [cell for cell in head if cell.type == "th_open"]
            if token is tiles:
                token.attrSet("class", "tiles")
            elif any(cell.attrGet("style") for cell in columns):
                token.attrSet("class", "numbers")
            elif len(columns) <= 3:
                token.attrSet("class", "stacked")
        elif token.type == "tr_open" and following[0].type == "td_open":
            following[0].tag = result[index + 3].tag = "th"
            following[0].attrSet("scope", "row")
        elif token.type == "paragraph_open" and [child.type for child in following[0].children or []] == ["image"]:
            token.tag = "figure"  # the next paragraph is the caption
            token.attrs = {"role": "group", "aria-label": following[0].children[0].content}  # type: ignore[index]
            end, caption = result[index + 2], result[index + 3 : index + 6]
            end.tag, caption[0].tag, caption[2].tag = "figure", "figcaption", "figcaption"
            result[index + 2 : index + 6] = [*caption, end]
    return result


def image(self: Any, tokens: Sequence[Token], index: int, options: Any, env: dict[str, Any]) -> str:
    """The SVG of a plot."""
    plot: str = env["plots"][tokens[index].attrGet("src")]
    return plot


def fence(self: Any, tokens: Sequence[Token], index: int, options: Any, env: dict[str, Any]) -> str:
    """A sample as running text, a configuration folded, everything else as code."""
    text, language = tokens[index].content.removesuffix("\n"), tokens[index].info
    if language == "text":
        return f'<pre class="passage" dir="auto">\n{escapeHtml(text)}</pre>\n'  # HTML drops the newline after <pre>
    listing = f"<pre><code>{escapeHtml(text)}</code></pre>"
    lines = text.count("\n") + 1
    return f"<details><summary>{lines} lines</summary>\n{listing}</details>\n" if language == "yaml" else f"{listing}\n"
