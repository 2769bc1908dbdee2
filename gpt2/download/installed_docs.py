"""A corpus of English prose without a download: the docstrings of two packages that this project requires.

Both packages are pinned, so the corpus is the same on every machine and under every supported Python, independent of
other packages. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gpt2.atomic import atomic_write
from gpt2.errors import UserError

DISTRIBUTIONS = ("mlflow", "prefect")
"""of the pure Python packages that pyproject.toml pins with ==, those with the most prose"""
SHORTEST, LONGEST = 1_000, 8_000
"""characters per document: shorter texts are joined, longer ones are cut between paragraphs, so that shuffling
distributes every module over the corpus"""


@dataclass(frozen=True)
class CorpusDocument:
    origin: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    name: str
    """relative to the folder of packages"""
    path: Path
    sha256: str
    """from the wheel's RECORD: urlsafe base64 without padding"""

    def parse(self) -> ast.Module:
        """
        Raises:
            UserError: the file is missing, differs from the wheel's, or this Python cannot parse it.
        """
        try:
            data = self.path.read_bytes()
            actual = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            if actual != self.sha256:
                raise UserError(f"{self.path} has sha256 {actual}, its wheel {self.sha256}: reinstall the package")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about invalid escapes in the packages
                return ast.parse(data)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read ({error}): reinstall the package") from None


@dataclass(frozen=True)
class Installation:
    """The source files of DISTRIBUTIONS, which determine the corpus."""

    versions: tuple[tuple[str, str], ...]
    """(name, version)"""
    files: tuple[SourceFile, ...]
    """sorted by distribution, then by name"""

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(repr([(file.name, file.sha256) for file in self.files]).encode()).hexdigest()

    def describe(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions)


def installation() -> Installation:
    """Read the files and their hashes from the RECORD of each distribution, without opening them.

    Raises:
        UserError: a distribution is missing, or has no RECORD.
    """
    versions, files = [], []
    for name in DISTRIBUTIONS:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"the demo corpus needs the package {name}: pip install -c constraints.txt -e .") from None
        recorded = [
            SourceFile(file.as_posix(), Path(str(file.locate())), file.hash.value)
            for file in distribution.files or ()
            if file.suffix == ".py" and file.hash is not None and file.hash.mode == "sha256" and ".." not in file.parts
        ]
        if not recorded:
            raise UserError(f"the installed {name} {distribution.version} lists no source files: reinstall it with pip")
        versions.append((name, distribution.version))
        files += sorted(recorded, key=lambda file: file.name)
    return Installation(tuple(versions), tuple(files))


def write(path: Path, *, max_bytes: int) -> int:
    """Write the corpus atomically as parquet with the columns text and origin.

    Args:
        max_bytes: of UTF-8 text; documents beyond it are omitted.

    Returns:
        bytes of text.

    Raises:
        UserError: as `installation` and `SourceFile.parse`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    selected: list[CorpusDocument] = []
    size = 0
    for document in documents():
        size += len(document.text.encode())
        if selected and size > max_bytes:
            size -= len(document.text.encode())
            break
        selected.append(document)
    table = pa.table(
        {"text": [document.text for document in selected], "origin": [document.origin for document in selected]}
    )
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="snappy", row_group_size=1_000)
    return size


def documents() -> list[CorpusDocument]:
    """All documents, ordered by the hash of their text; repeated paragraphs are kept once."""
    return sorted(_pieces(docstrings()), key=lambda document: hashlib.sha256(document.text.encode()).digest())


def docstrings() -> Iterator[tuple[str, list[str]]]:
    """(module, paragraphs) of each module; docstrings of functions and classes begin with their names."""
    for file in installation().files:
        paragraphs = []
        for name, docstring in _docstrings_of(file.parse(), ""):
            own = prose(docstring)
            if own and name:
                own[0] = f"{name}: {own[0]}"
            paragraphs += own
        yield file.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"), paragraphs


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
_RULE = re.compile(r"\s*(\W)\1{2,}\s*")  # under or over a heading, or a separator
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
    """The paragraphs and list items of `text` that are English sentences, each on one line; without code, grammars,
    tables, signatures and headings."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text).expandtabs()):
        for item in _items(block):
            joined = " ".join(item.split())
            if is_prose(joined):
                paragraphs.append(joined)
    return paragraphs


def is_prose(line: str) -> bool:
    """Whether a line consists of words with enough function words for English sentences."""
    words = _WORD.findall(line)
    if len(words) < 5 or ">>>" in line or "::=" in line:
        return False
    letters = sum(map(str.isalpha, line))
    plain = letters + sum(character in _PUNCTUATION for character in line)
    common = sum(word.lower() in _COMMON for word in words) + line.count(" a ")  # a one-letter word is no _WORD
    return letters >= 0.7 * len(line) and plain >= 0.94 * len(line) and 8 * common >= len(words)


def _items(block: str) -> Iterator[str]:
    """The list items of a block of lines, or the block; without the rules around headings."""
    item: list[str] = []
    for line in block.split("\n"):
        if _RULE.fullmatch(line):
            item.clear()  # the lines above are a heading
            continue
        bullet = _BULLET.match(line)
        if bullet and item:
            yield " ".join(item)
            item = []
        item.append(line[bullet.end() :] if bullet else line)
    if item:
        yield " ".join(item)


def _pieces(sources: Iterable[tuple[str, list[str]]]) -> Iterator[CorpusDocument]:
    """Documents of about SHORTEST to LONGEST characters, of whole paragraphs; short neighbours share one."""
    seen: set[str] = set()
    pending: list[str] = []
    origins: list[str] = []
    length = 0

    def flush() -> Iterator[CorpusDocument]:
        nonlocal length
        if length >= SHORTEST:
            yield CorpusDocument(", ".join(dict.fromkeys(origins)), "\n\n".join(pending))
            pending.clear()
            origins.clear()
            length = 0

    for origin, paragraphs in sources:
        for paragraph in paragraphs:
            key = " ".join(_WORD.findall(paragraph)).lower()
            if key in seen:
                continue
            seen.add(key)
            pending.append(paragraph)
            origins.append(origin)
            length += len(paragraph) + 2
            if length >= LONGEST:
                yield from flush()
        yield from flush()
