"""Documents from jsonl and txt files, plain or compressed."""

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
    Compression,
    DocumentBatch,
    Kind,
    ReadOptions,
    WorkUnit,
    last_cut,
    open_raw,
    raise_if_transient,
)

_UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError)
# A separator is a whole line. Text is cut only before white space or after a separator's line, so a piece that begins
# with a separator begins with a line.
_SEPARATOR = re.compile(rb"(?:\A|(?<=\n))" + re.escape(SEPARATOR) + rb"\r?\n")
_SEPARATOR_LINE = b"\n" + SEPARATOR
_OVERLAP = len(_SEPARATOR_LINE) + 2
_LINE_END = ord("\n")
_LAST_SEPARATOR = re.compile(rb"(?:\A|(?<=\n))" + re.escape(SEPARATOR) + rb"(?:\r?\n|\Z)")


def divide(path: str, name: str, kind: Kind, compression: Compression | None, options: ReadOptions) -> list[WorkUnit]:
    """Byte ranges of about UNIT_BYTES; a compressed file is one unit, as it can be read only from its start.

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
        _check_field(path, name, compression, options.column)
    return [
        WorkUnit(
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
    """Offsets about UNIT_BYTES apart where cutting a text does not change its tokens, and whether a document begins
    there."""
    cuts = [(0, True)]
    target = UNIT_BYTES
    while target < size:
        file.seek(target)
        data = file.read(1 << 16)
        cut = _last_text_cut(data)
        if cut >= 0:
            cuts.append((target + cut, data[cut - 1] == _LINE_END))  # a cut after a line's end follows a separator
            target += cut + UNIT_BYTES
        else:
            target += len(data) - _OVERLAP if len(data) == 1 << 16 else len(data)
    return [*cuts, (size, True)]


def _last_text_cut(data: bytes | bytearray, start: int = 0) -> int:
    """As last_cut, or after the line of a separator, but never between a separator and its line's end, without which
    it would be text."""
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
        raise_if_transient(error, name)
        return  # raised with its place when the unit is read
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
    """Reads all frames of a zstd file. zstandard's own reader does not detect a truncated frame."""

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


def read_jsonl(unit: WorkUnit, options: ReadOptions) -> Iterator[DocumentBatch]:
    """The lines that begin inside the unit's bytes. See corpus.read."""
    bad = BadInput(options.on_bad_input)
    documents: list[bytes] = []
    held = consumed = 0
    with open_raw(unit.path, unit.name) as raw, _decompress(raw, unit.compression) as file:
        try:
            position = unit.first
            if position:
                file.seek(position - 1)
                position += len(file.readline()) - 1  # a line that begins before `first` belongs to the previous unit
            while unit.compression or position < unit.last:
                line = file.readline()
                if not line:
                    break
                document = _field(line, options, unit, position, bad)
                position += len(line)
                if document is not None:
                    documents.append(document)
                    held += len(document)
                if held >= BATCH_BYTES:
                    end = min(raw.tell() if unit.compression else position - unit.first, unit.size)
                    yield DocumentBatch.of(documents, consumed=end - consumed, skipped=bad.take())
                    documents, held, consumed = [], 0, end
        except _UNREADABLE as error:
            _unreadable(bad, unit, error)
        yield DocumentBatch.of(documents, consumed=unit.size - consumed, skipped=bad.take())


def _record(line: bytes) -> Any:
    """Parse a line. json.loads on bytes would accept encoded surrogates, which are not UTF-8, and refuse a BOM."""
    return json.loads(line.removeprefix(codecs.BOM_UTF8).decode())


def _field(line: bytes, options: ReadOptions, unit: WorkUnit, position: int, bad: BadInput) -> bytes | None:
    """The document of a line as UTF-8; None for an empty or unusable line."""
    column, limit = options.column, options.max_document_bytes
    try:
        record = _record(line)
        text = record.get(column, record)  # the record itself means that the field is missing
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except (ValueError, RecursionError) as error:
        if line.isspace():
            return None
        # Without the position, so that equal errors of many lines are one entry.
        reason = f"not JSON: {getattr(error, 'msg', None) or error}"
    except AttributeError:
        reason = f"{type(record).__name__} instead of an object"
    else:
        if isinstance(text, str):
            document = to_utf8(text)
            if limit is None or len(document) <= limit:
                return document
            place = f"{_line_number(unit, position)} with {len(document):,} bytes of text"
            bad.add(unit.name, options.too_long(), place)
            return None
        kind = "null" if text is None else type(text).__name__
        reason = f"no field {column!r}" if text is record else f"{kind} instead of text"
    bad.add(unit.name, reason, lambda: _line_number(unit, position))
    return None


def to_utf8(text: str) -> bytes:
    """Encode a string as UTF-8, with surrogates as tiktoken treats them: pairs are joined, others become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _line_number(unit: WorkUnit, position: int) -> str:
    """Number of the line at byte `position`; reads the file up to there."""
    line = 1
    with open_raw(unit.path, unit.name) as raw, _decompress(raw, unit.compression) as file:
        while position > 0 and (data := file.read(min(position, 1 << 20))):
            line += data.count(b"\n")
            position -= len(data)
    return f"line {line:,}"


def _unreadable(bad: BadInput, unit: WorkUnit, error: BaseException) -> None:
    raise_if_transient(error, unit.name)
    reason = f"cannot be read to its end: {' '.join(str(error).split())[:200]}"
    bad.add(unit.name, reason, "compressed data" if unit.compression else f"bytes from {unit.first:,}", rows=0)


# --------------------------------------------------------------------------------------------------------------- txt


def read_txt(unit: WorkUnit, options: ReadOptions) -> Iterator[DocumentBatch]:
    """The text of the unit's bytes. See corpus.read."""
    bad = BadInput(options.on_bad_input)
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
                # Search only the new bytes: otherwise time is quadratic in text without a cut.
                cut = len(data) if final else _last_text_cut(data, max(0, len(data) - len(block) - _OVERLAP))
                if final or cut >= BATCH_BYTES // 2:
                    end = unit.size if final else raw.tell() if unit.compression else unit.size - left
                    at_end = final and (unit.compression is not None or unit.last == raw.seek(0, 2))
                    batch, open_document = _split(bytes(data[:cut]), open_document, at_end, unit, bad)
                    batch.consumed, consumed = end - consumed, end
                    batch.skipped = bad.take()
                    yield batch
                    del data[:cut]
                if final:
                    break
        except _UNREADABLE as error:
            _unreadable(bad, unit, error)
            yield DocumentBatch.of([], consumed=unit.size - consumed, skipped=bad.take())


def _split(data: bytes, open_document: bool, at_end: bool, unit: WorkUnit, bad: BadInput) -> tuple[DocumentBatch, bool]:
    """Split a piece of text into documents; also whether the last may continue in the next piece."""
    documents: list[bytes] = []
    begins, position = not open_document, 0
    for match in (_LAST_SEPARATOR if at_end else _SEPARATOR).finditer(data):
        _append(documents, data[position : match.start()], unit, bad)
        begins = begins or not documents  # a separator before any text ends the open document
        open_document, position = False, match.end()
    more = _append(documents, data[position:], unit, bad)
    return DocumentBatch.of(documents, begins=begins), more or open_document


def _append(documents: list[bytes], text: bytes, unit: WorkUnit, bad: BadInput) -> bool:
    """Append `text` if it is usable and not empty; whether it was appended."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        near = text[max(0, error.start - 20) : error.start + 4]
        bad.add(unit.name, "not UTF-8", f"bytes {unit.first:,} to {unit.last:,}, near {near!r}")
        return False
    if text:
        documents.append(text)
    return bool(text)
