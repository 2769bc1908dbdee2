"""A report as one HTML file that needs nothing else: no script, no font, no picture from anywhere.

It follows the reader's light or dark theme, reads on a phone, and prints in light colours. Every character that is
not ours is escaped, and the page's own security policy allows no request at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

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
    Tile,
    parts,
)
from gpt2.report.style import CSS, POLICY
from gpt2.report.text import visible


def render(document: Document, pictures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        pictures: name of a plot -> its <svg> element.
    """
    chapters = "\n".join(
        f"<section>\n<h2>{_escaped(chapter.title)}</h2>\n"
        + "\n".join(_block(block, pictures) for block in chapter.blocks)
        + "\n</section>"
        for chapter in document.chapters
    )
    tiles = "\n".join(_tile(tile) for tile in document.tiles)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_escaped(document.title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{_escaped(document.title)}</h1>
<p class="subtitle">{_inline(document.subtitle)}</p>
<dl class="tiles">
{tiles}
</dl>
<p class="lead">{_inline(document.lead)}</p>
{chapters}
</main>
</body>
</html>
"""


def _tile(tile: Tile) -> str:
    beside = f'<dd class="beside">{_escaped(tile.beside)}</dd>' if tile.beside else ""
    return (
        f'<div class="tile"><dt>{_escaped(tile.label)}</dt><dd class="value">{_escaped(tile.value)}</dd>{beside}</div>'
    )


def _block(block: Block, pictures: Mapping[str, str]) -> str:
    match block:
        case Paragraph():
            return f"<p>{_inline(block.text)}</p>"
        case Points():
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in block.items) + "\n</ul>"
        case Table():
            return _table(block)
        case Listing():
            listing = f"<pre><code>{_escaped(block.text)}</code></pre>"
            return (
                f"<details><summary>{_escaped(block.folded)}</summary>\n{listing}\n</details>"
                if block.folded
                else listing
            )
        case Passage():
            prompt = f"<b>{_escaped(block.prompt)}</b>" if block.prompt else ""
            # a newline right after <pre> is dropped by HTML; one of our own keeps the text's first line
            passage = f'<pre class="passage" dir="auto">\n{prompt}{_escaped(block.text)}</pre>'
            return f"<h3>{_escaped(block.heading)}</h3>\n{passage}"
        case Gallery():
            figures = "\n".join(
                f'<figure role="group" aria-label="{_escaped(picture.title)}">\n{pictures[picture.name]}\n'
                f"<figcaption>{_escaped(picture.caption)}</figcaption>\n</figure>"
                for picture in block.pictures
            )
            return f'<div class="gallery">\n{figures}\n</div>'


def _table(table: Table) -> str:
    kind = ' class="numbers"' if table.numbers else ' class="stacked"' if len(table.head) <= 3 else ""
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in table.head)
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.head) else ""
    rows = []
    for row in table.rows:
        cells = [f'<th scope="row">{_inline(row[0])}</th>']
        for column, cell in enumerate(row[1:], start=1):
            strong = ' class="strong"' if column == table.strong else ""
            cells.append(f"<td{strong}>{_inline(cell)}</td>")
        rows.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll"><table{kind}>\n{head}<tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>"


def _inline(text: Text) -> str:
    return "".join(
        f"<code>{_escaped(part)}</code>" if isinstance(part, Code) else _escaped(part) for part in parts(text)
    )


def _escaped(text: str) -> str:
    return escape(visible(text))
