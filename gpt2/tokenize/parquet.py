"""Documents out of parquet files, straight from Arrow's buffers: no Python string is made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpt2.errors import UserError
from gpt2.tokenize.reading import BATCH_BYTES, UNIT_BYTES, BadInput, Batch, Reading, Unit, open_raw, raise_if_passing

_TEXT = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())  # how some writers store text
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)
_FIRST_ROWS, _MOST_ROWS, _GROWTH = 64, 4096, 8  # of a batch; how many times the rows of the batch before
_REPEATED = 8  # times as much text as the file has bytes for those rows: it has a text once that many rows have
_held = threading.local()  # the file a thread read last: its footer is parsed once for all of its units


def divide(path: str, name: str, reading: Reading, bad: BadInput) -> list[Unit]:
    """Units of whole row groups, each of about UNIT_BYTES of text unless one row group is larger.

    Raises:
        UserError: the file is missing, or has no such column, or one that is no text; or it is no parquet file, unless
            `reading` says to skip such.
    """
    try:
        file = _open(path, name)
    except _UNREADABLE as error:
        raise_if_passing(error, name)
        bad.add(name, f"not a readable parquet file: {_one_line(error)}", "its footer", rows=0)
        return []
    schema = file.schema_arrow
    if (same := len(_leaves(file, reading.column))) > 1:
        raise UserError(
            f"{name} has {same} columns that {reading.column!r} may mean (a name that comes twice, or a field of a "
            f"struct): rename all but one, or set text_column to another"
        )
    if reading.column not in schema.names:
        have = ", ".join(schema.names)
        raise UserError(f"{name} has no column {reading.column!r}; it has {have}: set text_column to one of these")
    kind = schema.field(reading.column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in _TEXT and kind not in _BYTES:
        raise UserError(f"{name}: column {reading.column!r} is {kind}, not text; set text_column to another")
    sizes = _sizes(file, reading.column)
    units, first = [], 0
    for index in range(len(sizes)):
        size = sum(sizes[first : index + 1])
        if size >= UNIT_BYTES or index + 1 == len(sizes):
            units.append(Unit(path=path, name=name, kind="parquet", first=first, last=index + 1, size=size))
            first = index + 1
    return units


def read(unit: Unit, reading: Reading) -> Iterator[Batch]:
    """See corpus.read. A row group is decoded in pieces, so its size does not matter.

    How many rows make BATCH_BYTES is known only from rows that were read: where a text is there many times, the file
    has it once, and its sizes are those of the numbers that stand for it. They tell no more than the most there can be.
    """
    bad = BadInput(reading.on_bad_input)
    try:
        file = _open(unit.path, unit.name)
    except _UNREADABLE as error:
        raise_if_passing(error, unit.name)
        raise
    sizes = _sizes(file, reading.column)
    wanted = _FIRST_ROWS
    for group in range(unit.first, unit.last):
        size, rows = sizes[group], file.metadata.row_group(group).num_rows
        most = max(1, min(rows, _MOST_ROWS, rows * BATCH_BYTES // max(size, 1)))
        done = consumed = 0
        try:
            records = file.iter_batches(
                min(wanted, most), row_groups=[group], columns=[reading.column], use_threads=False
            )
            for record in records:
                array = _text(record.column(0), reading, unit.name, group, done, bad)
                done += record.num_rows
                batch = _batch(array, skipped=bad.take())
                text, even = int(batch.offsets[-1] - batch.offsets[0]), size * record.num_rows // rows
                share = text if text <= _REPEATED * even else even
                batch.consumed = size - consumed if done == rows else min(share, size - consumed)
                consumed += batch.consumed
                fitting = record.num_rows * BATCH_BYTES // max(1, text)
                wanted = max(1, min(_GROWTH * wanted, fitting))
                file.reader.set_batch_size(min(wanted, most))  # Arrow asks for it anew at each batch
                yield batch
        except _UNREADABLE as error:
            _held.file = None
            raise_if_passing(error, unit.name)
            reason = f"cannot be read: {_one_line(error)}"
            bad.add(unit.name, reason, f"row group {group}, row {done}", row_group=group, rows=rows - done)
            yield Batch.of([], consumed=size - consumed, skipped=bad.take())


def _open(path: str, name: str) -> pq.ParquetFile:
    stat = None if "://" in path or not Path(path).exists() else Path(path).stat()
    key = (path, stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns))  # not a file that was replaced since
    held: tuple[object, pq.ParquetFile] | None = getattr(_held, "file", None)
    if held is not None and held[0] == key:
        return held[1]
    # pre_buffer would fetch the column of the whole file; a buffer_size lets a column chunk be read in pieces.
    file = pq.ParquetFile(open_raw(path, name), pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    _held.file = (key, file)
    return file


def _leaves(file: pq.ParquetFile, column: str) -> list[int]:
    """Indices of the stored columns with that path: a field b of a struct a has the path "a.b"."""
    schema = file.metadata.schema
    return [index for index in range(len(schema)) if schema.column(index).path == column]


def _sizes(file: pq.ParquetFile, column: str) -> list[int]:
    """Bytes of the column in each row group, before compression."""
    meta = file.metadata
    leaf = _leaves(file, column)[0]
    return [meta.row_group(group).column(leaf).total_uncompressed_size for group in range(meta.num_row_groups)]


def _text(array: pa.Array, reading: Reading, name: str, group: int, row: int, bad: BadInput) -> pa.Array:
    """The usable rows as a string or large_string array; `row` is the first one's number in its row group."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.type in (pa.string_view(), pa.binary_view()):
        array = array.cast(pa.large_string() if array.type == pa.string_view() else pa.large_binary())
    if array.type in (pa.binary(), pa.large_binary()):
        array = array.view(pa.string() if array.type == pa.binary() else pa.large_string())
    numbers = row + np.arange(len(array))
    if array.null_count:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        place = f"row group {group}, row {numbers[~valid][0]}"
        bad.add(name, "null instead of text", place, row_group=group, rows=array.null_count)
        numbers, array = numbers[valid], array.drop_null()
    if reading.max_document_bytes is not None:
        lengths = pc.binary_length(array).to_numpy(zero_copy_only=False)
        long = lengths > reading.max_document_bytes
        if long.any():
            place = f"row group {group}, row {numbers[long][0]} with {lengths[long][0]:,} bytes of text"
            bad.add(name, reading.too_long(), place, row_group=group, rows=int(long.sum()))
            numbers, array = numbers[~long], array.filter(pa.array(~long))
    try:
        array.validate(full=True)  # Arrow takes a file's word for it that its text is UTF-8
        return array
    except pa.ArrowInvalid:
        usable = np.ones(len(array), dtype=bool)
        for index in range(len(array)):
            try:
                array[index].as_py()
            except UnicodeDecodeError:
                usable[index] = False
                bad.add(name, "not UTF-8", f"row group {group}, row {numbers[index]}", row_group=group)
        return array.filter(pa.array(usable))


def _batch(array: pa.Array, **more: Any) -> Batch:
    """An Arrow text array as a Batch over the same memory."""
    if len(array) == 0:
        return Batch.of([], **more)
    _, raw_offsets, data = array.buffers()
    kind = np.int64 if array.type == pa.large_string() else np.int32
    offsets = np.frombuffer(raw_offsets, dtype=kind)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    text = np.frombuffer(data, dtype=np.uint8) if data is not None and data.size else np.empty(0, dtype=np.uint8)
    return Batch(text, offsets, **more)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
