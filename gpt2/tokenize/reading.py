"""Shared by all readers of data files: units of work, batches of documents, bad input, and cuts in long documents."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn

import fsspec  # type: ignore[import-untyped]
import numpy as np

from gpt2.config.section import Section
from gpt2.errors import UserError
from gpt2.stage.facts import Skipped

UNIT_BYTES = 16 << 20
"""approximate text per unit"""
BATCH_BYTES = 4 << 20
"""approximate text that a reader holds in memory"""
SEPARATOR = b"<|endoftext|>"

Kind = Literal["parquet", "jsonl", "txt"]
Compression = Literal["gzip", "zstd"]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Offsets = np.ndarray[Any, np.dtype[np.int64]]


class ReadOptions(NamedTuple):
    """How to read every unit."""

    column: str
    on_bad_input: Literal["error", "skip"] = "error"
    max_document_bytes: int | None = None
    """per parquet row or jsonl line, which are held in memory whole"""

    def too_long(self) -> str:
        return f"longer than tokenize.max_document_bytes={self.max_document_bytes:,}"


class WorkUnit(Section):
    """A part of one file, read by one worker."""

    path: str
    """a path or an address"""
    name: str
    """of the file, for messages"""
    kind: Kind
    compression: Compression | None = None
    first: int
    """row group (parquet) or byte"""
    last: int
    """one past the last row group or byte; a jsonl line that begins before `last` belongs to this unit"""
    size: int
    """bytes, for progress and estimates: of the text column before compression, or of the file"""
    opens: bool = True
    """txt: whether a new document begins with this unit"""


@dataclass
class DocumentBatch:
    """UTF-8 documents, or parts of long ones, in one buffer."""

    data: Bytes
    offsets: Offsets
    """(n + 1,): document i is data[offsets[i] : offsets[i + 1]]"""
    begins: bool = True
    """False if the first entry continues the last document of the previous batch"""
    consumed: int = 0
    """bytes of the unit's `size` that this batch accounts for"""
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    @staticmethod
    def of(documents: list[bytes], **more: Any) -> DocumentBatch:
        offsets = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum([len(document) for document in documents], out=offsets[1:])
        return DocumentBatch(np.frombuffer(b"".join(documents), dtype=np.uint8), offsets, **more)


class BadInput:
    """Collects a unit's unusable input, or raises at the first."""

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self.policy = policy
        self._rows: dict[tuple[str, int | None, str], tuple[int, str]] = {}

    def add(
        self, file: str, reason: str, where: str | Callable[[], str], *, row_group: int | None = None, rows: int = 1
    ) -> None:
        """Record `rows` unusable rows. `where` describes the first; a function is called for the first only.

        Raises:
            UserError: the policy is "error".
        """
        key = (file, row_group, reason)
        count, first = self._rows.get(key, (0, ""))
        first = first or (where if isinstance(where, str) else where())
        if self.policy == "error":
            raise UserError(
                f"{file}, {first}: {reason}; correct or remove the file, or set tokenize.on_bad_input=skip to skip and "
                f"list such input"
            )
        self._rows[key] = (count + rows, first)

    def take(self) -> list[Skipped]:
        """Remove and return the collected entries, one per file, row group and reason."""
        entries = [
            Skipped(file=file, row_group=row_group, rows=rows, reason=f"{reason}; first at {first}")
            for (file, row_group, reason), (rows, first) in self._rows.items()
        ]
        self._rows.clear()
        return entries


class TransientReadError(OSError):
    """Reading failed for a reason other than the file's content. Such input is never skipped: the bytes must depend on
    the content alone. Not a UserError, so that a cluster retries; a stage prints it in one line, as any OSError."""


def raise_if_transient(error: BaseException, name: str) -> None:
    """Return only if `error` means that the bytes of file `name` are bad.

    For bad bytes, Arrow raises an OSError without errno, gzip BadGzipFile, zlib and zstd no OSError. An OSError with
    errno comes from the operating system, and other subclasses of OSError from it or from a remote store.

    Raises:
        TransientReadError: time-outs, connections, permissions, devices, handles or memory.
    """
    if isinstance(error, TransientReadError):
        raise error
    if isinstance(error, gzip.BadGzipFile) or not isinstance(error, OSError | MemoryError):
        return
    if type(error) is not OSError or error.errno is not None:
        _raise_transient(error, name)


def _raise_transient(error: BaseException, name: str) -> NoReturn:
    reason = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:200])))
    raise TransientReadError(f"{name} cannot be read now ({reason}): resolve this and run again, finished work is kept")


def open_raw(path: str, name: str) -> IO[bytes]:
    """Open a file or address for reading bytes, with seek.

    Raises:
        UserError: it is missing.
        TransientReadError: any other failure.
    """
    try:
        return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")
    except FileNotFoundError:
        target = path if "://" in path else Path(path).resolve()
        raise UserError(
            f"data file {name} is missing ({target}): restore it, or delete the download stage's "
            f"directory and run again"
        ) from None
    except OSError as error:
        _raise_transient(error, name)


# ---------------------------------------------------------------------------------------------- cutting long documents

# ASCII white space (searched first, for speed) after a character that is not white space. Multi-byte characters end
# with 80 to BF; those that GPT-2's pattern calls \s are U+0085, 00A0, 1680, 2000-200A, 2028, 2029, 202F, 205F and 3000.
_CUT = re.compile(
    rb"[ \t\r\n](?<=[!-~\x80-\xbf].)(?<!\xc2[\x85\xa0].)(?<!\xe1\x9a\x80.)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf].)"
    rb"(?<!\xe2\x81\x9f.)(?<!\xe3\x80\x80.)",
    re.DOTALL,
)


def last_cut(data: bytes | bytearray | memoryview, start: int, end: int) -> int:
    """The last index in data[start:end] where cutting a document does not change its tokens; -1 if there is none.

    In GPT-2's pattern, a piece with any other character has white space only at its start, so it ends before white
    space. The pattern looks ahead only from white space and never back. So before white space that follows another
    character, the text on either side is split as if the document ended and began there.
    """
    window, stop = 1 << 12, end
    while stop > start:
        begin = max(start, stop - window)
        cut = -1
        for match in _CUT.finditer(data, max(begin, start + 1), stop):  # lookbehind reads before `begin`
            cut = match.start()
        if cut >= 0:
            return cut
        stop, window = begin, 4 * window
    return -1


def slices(batch: DocumentBatch, limit: int = 2 * BATCH_BYTES) -> Iterator[DocumentBatch]:
    """Split a batch into batches of at most `limit` bytes, between documents or inside longer ones.

    Only text without a cut stays longer. `consumed` and `skipped` are not carried over.
    """
    offsets = batch.offsets
    if offsets[-1] - offsets[0] <= limit:
        yield batch
        return
    view = batch.data.data
    index, begins = 0, batch.begins
    while index < len(batch):
        end = int(np.searchsorted(offsets, offsets[index] + limit, side="right")) - 1
        if end > index:  # whole documents
            yield DocumentBatch(batch.data, offsets[index : end + 1], begins)
            index, begins = end, True
            continue
        start, stop = int(offsets[index]), int(offsets[index + 1])
        while stop - start > limit:
            cut = last_cut(view, start, start + limit)
            if cut < 0:
                forward = _CUT.search(view, start + limit, stop)
                if forward is None:
                    break
                cut = forward.start()
            yield DocumentBatch(batch.data, np.array([start, cut], dtype=np.int64), begins)
            start, begins = cut, False
        yield DocumentBatch(batch.data, np.array([start, stop], dtype=np.int64), begins)
        index, begins = index + 1, True
