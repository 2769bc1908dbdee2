"""English prose that every Python installation has: a corpus where no other can be had.

Three kinds: the interpreter's documentation topics (pydoc_data), the docstrings of the standard library, and the long
descriptions of the installed distributions. Sources are parsed, never imported. The same installation gives the same
bytes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gpt2.atomic import atomic_write
from gpt2.errors import UserError

OWN_DISTRIBUTION = "reproduce-gpt2"  # an edit of our README must not change the corpus
NOT_DOCUMENTATION = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
SHORTEST, LONGEST = 1_000, 8_000
"""characters of a document: shorter ones are joined, longer ones cut between paragraphs, so that hashing spreads
every kind evenly over the corpus"""


@dataclass(frozen=True)
class Document:
    kind: str
    """topics, docstrings or descriptions"""
    origin: str
    text: str


@dataclass(frozen=True)
class Installation:
    """What the documents are made of, as far as it decides them."""

    python: str
    modules: tuple[tuple[str, int], ...]
    """source files of the standard library: path relative to it, bytes"""
    distributions: tuple[tuple[str, str], ...]
    """(name, version), sorted"""

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(repr((self.python, self.modules, self.distributions)).encode()).hexdigest()

    def describe(self) -> str:
        return f"Python {self.python}, {len(self.distributions)} distributions"


def installation() -> Installation:
    """Look at this interpreter; reads no more than names, sizes and versions."""
    stdlib = _stdlib()
    modules = tuple((path.relative_to(stdlib).as_posix(), path.stat().st_size) for path in _modules(stdlib))
    distributions = tuple((name, distribution.version) for name, distribution in _distributions())
    return Installation(platform.python_version(), modules, distributions)


def write(path: Path, *, max_bytes: int) -> int:
    """Write the corpus as parquet with the columns text, kind and origin, whole or not at all.

    Args:
        max_bytes: of UTF-8 text; documents beyond it are left out.

    Returns:
        bytes of text.

    Raises:
        UserError: the installation has no documentation.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen: list[Document] = []
    size = 0
    for document in documents():
        size += len(document.text.encode())
        if chosen and size > max_bytes:
            size -= len(document.text.encode())
            break
        chosen.append(document)
    if not chosen:
        raise UserError(f"the Python at {sys.prefix} has no documentation: use a source of kind local or hub")
    table = pa.table(
        {
            "text": [document.text for document in chosen],
            "kind": [document.kind for document in chosen],
            "origin": [document.origin for document in chosen],
        }
    )
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="snappy", row_group_size=1_000)
    return size


def documents() -> list[Document]:
    """All documents, shuffled by the hash of their text; a paragraph that comes twice is kept where it comes first."""
    seen: set[str] = set()
    made = [*_pieces("topics", topics(), seen), *_pieces("docstrings", docstrings(), seen)]
    made += _pieces("descriptions", descriptions(), seen)
    return sorted(made, key=lambda document: hashlib.sha256(document.text.encode()).digest())


# ------------------------------------------------------------------------------------- the kinds: (origin, paragraphs)


def topics() -> Iterator[tuple[str, list[str]]]:
    """The interpreter's documentation topics, those that `help("topics")` lists."""
    try:
        tree = ast.parse((_stdlib() / "pydoc_data" / "topics.py").read_bytes())
    except (OSError, SyntaxError):
        return
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield topic, prose(text)


def docstrings() -> Iterator[tuple[str, list[str]]]:
    """The docstrings of each module of the standard library, those of functions and classes led by their names."""
    stdlib = _stdlib()
    for path in _modules(stdlib):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes are not ours to report
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        module = path.relative_to(stdlib).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        paragraphs = []
        for name, docstring in _docstrings_of(tree, ""):
            own = prose(docstring)
            if own and name:
                own[0] = f"{name}: {own[0]}"
            paragraphs += own
        yield module, paragraphs


def descriptions() -> Iterator[tuple[str, list[str]]]:
    """The long descriptions of the installed distributions, freed of mark-up."""
    for name, distribution in _distributions():
        metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        _, _, body = metadata.replace("\r\n", "\n").partition("\n\n")
        yield name, prose(without_markup(body))


def _docstrings_of(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings_of(child, f"{name}.{child.name}" if name else child.name)


# ---------------------------------------------------------------------------------------------------- text to prose

_BULLET = re.compile(r"\s*(?:[-*+•]|\d{1,2}[.)]|\(\d{1,2}\))\s+")
_RULE = re.compile(r"\s*(\W)\1{2,}\s*")  # under or over a heading, or across the page
_WORD = re.compile(r"[A-Za-z][a-z]+")
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can does for from has have if in into is it its may must no not of on only "
        "or should so such than that the their then there these they this to use used uses was when which will with "
        "you your",
    )
)
_PUNCTUATION = frozenset(" ,.;:'\"!?()-–—“”‘’…")


def prose(text: str) -> list[str]:
    """The paragraphs and list items of `text` that are English sentences, each on one line.

    What is left out: code, grammars, tables, signatures, headings.
    """
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text).expandtabs()):
        for item in _items(block):
            joined = " ".join(item.split())
            if is_prose(joined):
                found.append(joined)
    return found


def is_prose(line: str) -> bool:
    """Whether a line is made of words, some of them those that hold English sentences together."""
    words = _WORD.findall(line)
    if len(words) < 5 or ">>>" in line or "::=" in line:
        return False
    letters = sum(map(str.isalpha, line))
    plain = letters + sum(character in _PUNCTUATION for character in line)
    common = sum(word.lower() in _COMMON for word in words) + line.count(" a ")  # a one-letter word is no _WORD
    return letters >= 0.7 * len(line) and plain >= 0.94 * len(line) and 8 * common >= len(words)


def _items(block: str) -> Iterator[str]:
    """A block of lines as its list items, or whole when it is no list; without the rules around headings."""
    item: list[str] = []
    for line in block.split("\n"):
        if _RULE.fullmatch(line):
            item.clear()  # what stood above was a heading
            continue
        bullet = _BULLET.match(line)
        if bullet and item:
            yield " ".join(item)
            item = []
        item.append(line[bullet.end() :] if bullet else line)
    if item:
        yield " ".join(item)


_MARKUP = [
    (re.compile(pattern, flags), replacement)
    for pattern, flags, replacement in [
        (r"<!--.*?-->", re.DOTALL, ""),
        (r"^( *)(```|~~~).*?^ *\2 *$", re.DOTALL | re.MULTILINE, ""),  # fenced code
        (r"<(pre|table|svg|style|script)\b.*?</\1>", re.DOTALL | re.IGNORECASE, ""),
        (r"`([^`<>]+?)\s*<[^`<>]+>`_{1,2}", 0, r"\1"),  # links of reStructuredText, whose addresses look like tags
        (r"</?[A-Za-z][^<>]*>", 0, ""),  # tags
        (r"\[?!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])(?:\](?:\([^)]*\)|\[[^\]]*\]))?", 0, ""),  # images and badges
        (r"\[([^\]\[]+)\](?:\(\s*[^)]*\)|\[[^\]]*\])", 0, r"\1"),  # links
        (r"^ *\[[^\]]+\]: .*$", re.MULTILINE, ""),  # their targets
        (r"^ *\.\. .*(?:\n(?: +.*|(?=\n)))*", re.MULTILINE, ""),  # its directives, with what they hold
        (r":[a-z:]+:`~?([^`]+)`", 0, r"\1"),  # its roles
        (r"https?://\S+", 0, ""),
        (r"^#+ .*$", re.MULTILINE, "\n"),  # headings
        (r"\*\*|__(?=\w)|(?<=\w)__|``?", 0, ""),
        (r"`_{1,2}", 0, ""),
        (r"(?<=[A-Za-z0-9])_(?=[\s.,;:)])", 0, ""),  # named references of reStructuredText
        (r"&nbsp;", 0, " "),
        (r"&amp;", 0, "&"),
        (r"\\([_*`#])", 0, r"\1"),
    ]
]


def without_markup(text: str) -> str:
    """Markdown, reStructuredText or HTML as plain text: without code, images, badges, tags and addresses."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


def _pieces(kind: str, sources: Iterable[tuple[str, list[str]]], seen: set[str]) -> Iterator[Document]:
    """Documents of SHORTEST to LONGEST characters, as far as paragraphs allow; short neighbours share one."""
    waiting: list[str] = []
    origins: list[str] = []
    length = 0

    def flush() -> Iterator[Document]:
        nonlocal length
        if length >= SHORTEST:
            yield Document(kind, ", ".join(dict.fromkeys(origins)), "\n\n".join(waiting))
            waiting.clear()
            origins.clear()
            length = 0

    for origin, paragraphs in sources:
        for paragraph in paragraphs:
            key = " ".join(_WORD.findall(paragraph)).lower()
            if key in seen:
                continue
            seen.add(key)
            waiting.append(paragraph)
            origins.append(origin)
            length += len(paragraph) + 2
            if length >= LONGEST:
                yield from flush()
        yield from flush()


# -------------------------------------------------------------------------------------------- this installation's files


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules(stdlib: Path) -> list[Path]:
    """Source files of the standard library, sorted; without its tests."""
    found = []
    for folder, folders, names in os.walk(stdlib):
        folders[:] = [name for name in folders if name not in NOT_DOCUMENTATION]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _distributions() -> list[tuple[str, importlib.metadata.Distribution]]:
    """Installed distributions by normalised name, sorted; the first one on sys.path where there are several."""
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=folders):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and name != OWN_DISTRIBUTION:
            found.setdefault(name, distribution)
    return sorted(found.items())
