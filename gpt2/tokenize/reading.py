"""What every reader of data files shares: units of work, batches of documents, bad input, places to cut."""

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
"""of text, about, in a unit"""
BATCH_BYTES = 4 << 20
"""of text, about, that a reader has in memory at a time"""
SEPARATOR = b"<|endoftext|>"

Kind = Literal["parquet", "jsonl", "txt"]
Compression = Literal["gzip", "zstd"]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Offsets = np.ndarray[Any, np.dtype[np.int64]]


class Reading(NamedTuple):
    """How to read, the same for every unit."""

    column: str
    on_bad_input: Literal["error", "skip"] = "error"
    max_document_bytes: int | None = None
    """of a parquet row or a jsonl line, which are held whole"""

    def too_long(self) -> str:
        """The reason that is given for a longer document."""
        return f"longer than tokenize.max_document_bytes={self.max_document_bytes:,}"


class Unit(Section):
    """A part of the corpus that one worker reads."""

    path: str
    """a path or an address"""
    name: str
    """of the file, for people"""
    kind: Kind
    compression: Compression | None = None
    first: int
    """row group (parquet) or byte"""
    last: int
    """one past the last row group or byte; a jsonl line that begins before `last` belongs to the unit"""
    size: int
    """bytes of input, for progress and estimates: of the text column before compression, or of the file"""
    opens: bool = True
    """txt: whether the unit begins with a new document"""


@dataclass
class Batch:
    """Documents, or parts of long ones, as UTF-8 in one buffer."""

    data: Bytes
    offsets: Offsets
    """(n + 1,): document i is data[offsets[i] : offsets[i + 1]]"""
    begins: bool = True
    """whether the first is the start of a document and not the continuation of what came before"""
    consumed: int = 0
    """bytes of the unit's `size` that this batch stands for"""
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    @staticmethod
    def of(documents: list[bytes], **more: Any) -> Batch:
        offsets = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum([len(document) for document in documents], out=offsets[1:])
        return Batch(np.frombuffer(b"".join(documents), dtype=np.uint8), offsets, **more)


class BadInput:
    """Collects what cannot be used of one unit, or stops at the first of it."""

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self.policy = policy
        self._rows: dict[tuple[str, int | None, str], tuple[int, str]] = {}

    def add(
        self, file: str, reason: str, where: str | Callable[[], str], *, row_group: int | None = None, rows: int = 1
    ) -> None:
        """`where` says more about the place; a function is called only for the first of its kind.

        Raises:
            UserError: unless the configuration says to go on.
        """
        key = (file, row_group, reason)
        known, first = self._rows.get(key, (0, ""))
        first = first or (where if isinstance(where, str) else where())
        if self.policy == "error":
            raise UserError(
                f"{file}, {first}: {reason}; mend or remove the file, or set tokenize.on_bad_input=skip to leave out "
                f"what cannot be used and list it in the manifest"
            )
        self._rows[key] = (known + rows, first)

    def take(self) -> list[Skipped]:
        """What was collected since the last call, one entry a file, row group and reason."""
        entries = [
            Skipped(file=file, row_group=row_group, rows=rows, reason=f"{reason}; first at {first}")
            for (file, row_group, reason), (rows, first) in self._rows.items()
        ]
        self._rows.clear()
        return entries


class CannotReadNow(OSError):
    """A file could not be read this time, which says nothing about what is in it: it is never left out for that, or
    the bytes would depend on the weather. No UserError, so that a cluster tries again; yet its text is for people, and
    a stage prints it as one line like that of any OSError."""


def raise_if_passing(error: BaseException, name: str) -> None:
    """Return only if the bytes of file `name` are bad, and would be another time.

    Of those, Arrow says so with an OSError without a number, gzip with a subclass of its own, zlib and zstd with no
    OSError at all. Numbers come from the operating system, and subclasses from it or from a remote store.

    Raises:
        CannotReadNow: the error is one of time-outs, connections, permissions, devices, handles or memory.
    """
    if isinstance(error, CannotReadNow):
        raise error
    if isinstance(error, gzip.BadGzipFile) or not isinstance(error, OSError | MemoryError):
        return
    if type(error) is not OSError or error.errno is not None:
        _raise_passing(error, name)


def _raise_passing(error: BaseException, name: str) -> NoReturn:
    why = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:200])))
    raise CannotReadNow(f"{name} cannot be read now ({why}): put that right and run again, finished work is kept")


def open_raw(path: str, name: str) -> IO[bytes]:
    """Open a file or address for reading bytes, with seek.

    Raises:
        UserError: it is missing.
        CannotReadNow: it is there, as far as is known.
    """
    try:
        return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")
    except FileNotFoundError:
        target = path if "://" in path else Path(path).resolve()
        raise UserError(
            f"data file {name} is missing ({target}): bring it back, or delete the download stage's directory and run "
            f"again"
        ) from None
    except OSError as error:
        _raise_passing(error, name)


# ---------------------------------------------------------------------------------------------- cutting long documents

# ASCII white space, looked for first because that is quick, after a character that is none. One of several bytes ends
# with 80 to BF; those that the pattern calls \s are U+0085, 00A0, 1680, 2000 to 200A, 2028, 2029, 202F, 205F and 3000.
_CUT = re.compile(
    rb"[ \t\r\n](?<=[!-~\x80-\xbf].)(?<!\xc2[\x85\xa0].)(?<!\xe1\x9a\x80.)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf].)"
    rb"(?<!\xe2\x81\x9f.)(?<!\xe3\x80\x80.)",
    re.DOTALL,
)


def last_cut(data: bytes | bytearray | memoryview, start: int, end: int) -> int:
    """The last place in data[start:end] where a document can be cut without changing its tokens; -1: none.

    In GPT-2's pattern a piece that holds anything but white space has white space at its start only, so it always ends
    before white space; it looks ahead from white space only, and never back. So where white space follows anything
    else, what comes before is divided as if the document ended there, and what comes after as if it began.
    """
    window, stop = 1 << 12, end
    while stop > start:
        begin = max(start, stop - window)
        found = -1
        for match in _CUT.finditer(data, max(begin, start + 1), stop):  # the pattern sees what is before `begin`
            found = match.start()
        if found >= 0:
            return found
        stop, window = begin, 4 * window
    return -1


def slices(batch: Batch, limit: int = 2 * BATCH_BYTES) -> Iterator[Batch]:
    """A batch as batches of no more than `limit` bytes: cut between documents, or inside those that are longer.

    Only a document with no place to cut stays longer. What was consumed and skipped is left to the caller.
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
            yield Batch(batch.data, offsets[index : end + 1], begins)
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
            yield Batch(batch.data, np.array([start, cut], dtype=np.int64), begins)
            start, begins = cut, False
        yield Batch(batch.data, np.array([start, stop], dtype=np.int64), begins)
        index, begins = index + 1, True
