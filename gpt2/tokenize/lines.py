"""Documents out of jsonl and txt files, plain or compressed."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import IO, Any, cast

import zstandard

from gpt2.errors import UserError
from gpt2.tokenize.reading import (
    BATCH_BYTES,
    SEPARATOR,
    UNIT_BYTES,
    BadInput,
    Batch,
    Compression,
    Kind,
    Reading,
    Unit,
    last_cut,
    open_raw,
    raise_if_passing,
)

_UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError)
# A separator is a whole line. A text is cut only before white space or after such a line, so what a piece begins with
# is a line's beginning if it is a separator.
_SEPARATOR = re.compile(rb"(?:\A|(?<=\n))" + re.escape(SEPARATOR) + rb"\r?\n")
_SEPARATOR_LINE = b"\n" + SEPARATOR
_OVERLAP = len(_SEPARATOR_LINE) + 2
_LINE_END = ord("\n")
_LAST_SEPARATOR = re.compile(rb"(?:\A|(?<=\n))" + re.escape(SEPARATOR) + rb"(?:\r?\n|\Z)")


def divide(path: str, name: str, kind: Kind, compression: Compression | None, reading: Reading) -> list[Unit]:
    """Byte ranges of about UNIT_BYTES; a compressed file is one unit, for it can be read only from its start.

    Raises:
        UserError: the file is missing, or the first line of a jsonl file has no such field.
    """
    with open_raw(path, name) as file:
        size = file.seek(0, 2)
        if compression:
            borders = [(0, True), (size, True)]
        elif kind == "jsonl":
            borders = [(first, first == 0) for first in (*range(0, size, UNIT_BYTES), size)]
        else:
            borders = _cuts(file, size)
    if kind == "jsonl":
        _check_field(path, name, compression, reading.column)
    return [
        Unit(
            path=path,
            name=name,
            kind=kind,
            compression=compression,
            first=first,
            last=last,
            size=last - first,
            opens=opens,
        )
        for (first, opens), (last, _) in pairwise(borders)
    ]


def _cuts(file: IO[bytes], size: int) -> list[tuple[int, bool]]:
    """Places about UNIT_BYTES apart where a text can be cut without changing its tokens, and whether a document begins
    there."""
    cuts = [(0, True)]
    target = UNIT_BYTES
    while target < size:
        file.seek(target)
        data = file.read(1 << 16)
        found = _last_text_cut(data)
        if found >= 0:
            cuts.append((target + found, data[found - 1] == _LINE_END))  # one after a line's end is after a separator
            target += found + UNIT_BYTES
        else:
            target += len(data) - _OVERLAP if len(data) == 1 << 16 else len(data)
    return [*cuts, (size, True)]


def _last_text_cut(data: bytes | bytearray, start: int = 0) -> int:
    """As last_cut, and also after the line of a separator; but never just before that line's end, without which it
    would look like text."""
    cut = end = len(data)
    while (cut := last_cut(data, start, cut)) >= 0:
        if cut >= len(_SEPARATOR_LINE) and not data.endswith(_SEPARATOR_LINE, 0, cut):
            break
    while (end := data.rfind(_SEPARATOR_LINE, max(start, cut, 0), end)) >= 0:
        after = end + len(_SEPARATOR_LINE)
        after += data.startswith(b"\r", after)
        if data.startswith(b"\n", after) and after + 1 < len(data):
            return after + 1
    return cut


def _check_field(path: str, name: str, compression: Compression | None, column: str) -> None:
    try:
        with open_raw(path, name) as raw, _decompress(raw, compression) as file:
            record = _record(file.readline())
    except (*_UNREADABLE, ValueError, RecursionError) as error:
        raise_if_passing(error, name)
        return  # reading will say where
    if isinstance(record, dict) and column not in record:
        have = ", ".join(record)
        raise UserError(f"{name} has no field {column!r}; its first line has {have}: set text_column to one of these")


def _decompress(file: IO[bytes], compression: Compression | None) -> IO[bytes]:
    if compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if compression == "zstd":
        return cast(IO[bytes], io.BufferedReader(_ZstdFrames(file), buffer_size=1 << 20))
    return file


class _ZstdFrames(io.RawIOBase):
    """Frame after frame of a zstd file. zstandard's own reader takes a cut-off frame for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 18)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of a zstd frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


# ------------------------------------------------------------------------------------------------------------- jsonl


def read_jsonl(unit: Unit, reading: Reading) -> Iterator[Batch]:
    """The lines that begin inside the unit's bytes. See corpus.read."""
    bad = BadInput(reading.on_bad_input)
    documents: list[bytes] = []
    held = consumed = 0
    with open_raw(unit.path, unit.name) as raw, _decompress(raw, unit.compression) as file:
        try:
            position = unit.first
            if position:
                file.seek(position - 1)
                position += len(file.readline()) - 1  # the line that began before `first` is another unit's
            while unit.compression or position < unit.last:
                line = file.readline()
                if not line:
                    break
                document = _field(line, reading, unit, position, bad)
                position += len(line)
                if document is not None:
                    documents.append(document)
                    held += len(document)
                if held >= BATCH_BYTES:
                    now = min(raw.tell() if unit.compression else position - unit.first, unit.size)
                    yield Batch.of(documents, consumed=now - consumed, skipped=bad.take())
                    documents, held, consumed = [], 0, now
        except _UNREADABLE as error:
            _unreadable(bad, unit, error)
        yield Batch.of(documents, consumed=unit.size - consumed, skipped=bad.take())


def _record(line: bytes) -> Any:
    """A line's JSON. json.loads alone would let bytes pass that encode surrogates, which are no UTF-8, and a BOM."""
    return json.loads(line.removeprefix(codecs.BOM_UTF8).decode())


def _field(line: bytes, reading: Reading, unit: Unit, position: int, bad: BadInput) -> bytes | None:
    """One line's document as UTF-8, or None for an empty line or one that cannot be used."""
    column, limit = reading.column, reading.max_document_bytes
    try:
        record = _record(line)
        text = record.get(column, record)  # the record itself stands for "not there"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except (ValueError, RecursionError) as error:
        if line.isspace():
            return None
        # Without the position, so that the same mistake in many lines is listed once.
        reason = f"not JSON: {getattr(error, 'msg', None) or error}"
    except AttributeError:
        reason = f"{type(record).__name__} instead of an object"
    else:
        if isinstance(text, str):
            document = utf8(text)
            if limit is None or len(document) <= limit:
                return document
            place = f"{_line_number(unit, position)} with {len(document):,} bytes of text"
            bad.add(unit.name, reading.too_long(), place)
            return None
        what = "null" if text is None else type(text).__name__
        reason = f"no field {column!r}" if text is record else f"{what} instead of text"
    bad.add(unit.name, reason, lambda: _line_number(unit, position))
    return None


def utf8(text: str) -> bytes:
    """UTF-8 of a string; surrogates, which UTF-8 cannot hold, as tiktoken treats them: pairs are joined, others become
    U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _line_number(unit: Unit, position: int) -> str:
    """Where a line begins, for people: counts the lines before it, so it reads the file up to there."""
    line = 1
    with open_raw(unit.path, unit.name) as raw, _decompress(raw, unit.compression) as file:
        while position > 0 and (data := file.read(min(position, 1 << 20))):
            line += data.count(b"\n")
            position -= len(data)
    return f"line {line:,}"


def _unreadable(bad: BadInput, unit: Unit, error: BaseException) -> None:
    raise_if_passing(error, unit.name)
    reason = f"cannot be read to its end: {' '.join(str(error).split())[:200]}"
    bad.add(unit.name, reason, "compressed data" if unit.compression else f"bytes from {unit.first:,}", rows=0)


# --------------------------------------------------------------------------------------------------------------- txt


def read_txt(unit: Unit, reading: Reading) -> Iterator[Batch]:
    """The text of the unit's bytes. See corpus.read."""
    bad = BadInput(reading.on_bad_input)
    open_document = not unit.opens
    left, consumed = unit.size, 0
    data = bytearray()
    with open_raw(unit.path, unit.name) as raw, _decompress(raw, unit.compression) as file:
        try:
            if unit.first:
                file.seek(unit.first)
            while True:
                block = file.read(BATCH_BYTES if unit.compression else min(BATCH_BYTES, left))
                left -= len(block)
                data += block
                final = not block
                # Only what is new can hold a better place to cut: a text without any is not searched again and again.
                cut = len(data) if final else _last_text_cut(data, max(0, len(data) - len(block) - _OVERLAP))
                if final or cut >= BATCH_BYTES // 2:
                    now = unit.size if final else raw.tell() if unit.compression else unit.size - left
                    at_end = final and (unit.compression is not None or unit.last == raw.seek(0, 2))
                    batch, open_document = _split(bytes(data[:cut]), open_document, at_end, unit, bad)
                    batch.consumed, consumed = now - consumed, now
                    batch.skipped = bad.take()
                    yield batch
                    del data[:cut]
                if final:
                    break
        except _UNREADABLE as error:
            _unreadable(bad, unit, error)
            yield Batch.of([], consumed=unit.size - consumed, skipped=bad.take())


def _split(data: bytes, open_document: bool, at_end: bool, unit: Unit, bad: BadInput) -> tuple[Batch, bool]:
    """A piece of text as a Batch, and whether its last document may go on in the next piece."""
    documents: list[bytes] = []
    begins, position = not open_document, 0
    for match in (_LAST_SEPARATOR if at_end else _SEPARATOR).finditer(data):
        _append(documents, data[position : match.start()], unit, bad)
        begins = begins or not documents  # a separator before any text: what was open is closed
        open_document, position = False, match.end()
    more = _append(documents, data[position:], unit, bad)
    return Batch.of(documents, begins=begins), more or open_document


def _append(documents: list[bytes], text: bytes, unit: Unit, bad: BadInput) -> bool:
    """Whether there was text that can be used."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        near = text[max(0, error.start - 20) : error.start + 4]
        bad.add(unit.name, "not UTF-8", f"bytes {unit.first:,} to {unit.last:,}, near {near!r}")
        return False
    if text:
        documents.append(text)
    return bool(text)
