"""Documents from parquet files, as views of Arrow's buffers: no Python strings."""

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
from gpt2.tokenize.reading import (
    BATCH_BYTES,
    UNIT_BYTES,
    BadInput,
    DocumentBatch,
    ReadOptions,
    WorkUnit,
    open_raw,
    raise_if_transient,
)

_TEXT = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())  # how some writers store text
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)
_FIRST_ROWS, _MOST_ROWS = 64, 4096  # per batch
_GROWTH = 8  # limit of rows relative to the previous batch
_REPEATED = 8  # a ratio of text to bytes in the file above which the file stores repeated texts once
_last_file = threading.local()  # per thread, the last file: its footer is parsed once for all units


def divide(path: str, name: str, options: ReadOptions, bad: BadInput) -> list[WorkUnit]:
    """Units of whole row groups with about UNIT_BYTES of text each, or one larger row group.

    Raises:
        UserError: the file is missing, has no such column, or its column is no text; or it is no parquet file, unless
            `options` says to skip it.
    """
    try:
        file = _open(path, name)
    except _UNREADABLE as error:
        raise_if_transient(error, name)
        bad.add(name, f"not a readable parquet file: {_one_line(error)}", "its footer", rows=0)
        return []
    schema = file.schema_arrow
    if (matches := len(_leaves(file, options.column))) > 1:
        raise UserError(
            f"{name} has {matches} columns named {options.column!r} (a repeated name, or a field of a struct): rename "
            f"all but one, or set text_column to another"
        )
    if options.column not in schema.names:
        have = ", ".join(schema.names)
        raise UserError(f"{name} has no column {options.column!r}; it has {have}: set text_column to one of these")
    kind = schema.field(options.column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in _TEXT and kind not in _BYTES:
        raise UserError(f"{name}: column {options.column!r} is {kind}, not text; set text_column to another")
    sizes = _sizes(file, options.column)
    units, first = [], 0
    for index in range(len(sizes)):
        size = sum(sizes[first : index + 1])
        if size >= UNIT_BYTES or index + 1 == len(sizes):
            units.append(WorkUnit(path=path, name=name, kind="parquet", first=first, last=index + 1, size=size))
            first = index + 1
    return units


def read(unit: WorkUnit, options: ReadOptions) -> Iterator[DocumentBatch]:
    """See corpus.read. A row group of any size is decoded in pieces.

    The rows that make BATCH_BYTES are estimated from the rows read so far. The file's sizes give only an upper bound:
    with dictionary encoding, a repeated text counts once.
    """
    bad = BadInput(options.on_bad_input)
    try:
        file = _open(unit.path, unit.name)
    except _UNREADABLE as error:
        raise_if_transient(error, unit.name)
        raise
    sizes = _sizes(file, options.column)
    wanted = _FIRST_ROWS
    for group in range(unit.first, unit.last):
        size, rows = sizes[group], file.metadata.row_group(group).num_rows
        most = max(1, min(rows, _MOST_ROWS, rows * BATCH_BYTES // max(size, 1)))
        done = consumed = 0
        try:
            records = file.iter_batches(
                min(wanted, most), row_groups=[group], columns=[options.column], use_threads=False
            )
            for record in records:
                array = _text(record.column(0), options, unit.name, group, done, bad)
                done += record.num_rows
                batch = _batch(array, skipped=bad.take())
                text, even = int(batch.offsets[-1] - batch.offsets[0]), size * record.num_rows // rows
                share = text if text <= _REPEATED * even else even
                batch.consumed = size - consumed if done == rows else min(share, size - consumed)
                consumed += batch.consumed
                fitting = record.num_rows * BATCH_BYTES // max(1, text)
                wanted = max(1, min(_GROWTH * wanted, fitting))
                file.reader.set_batch_size(min(wanted, most))  # read by Arrow before each batch
                yield batch
        except _UNREADABLE as error:
            _last_file.file = None
            raise_if_transient(error, unit.name)
            reason = f"cannot be read: {_one_line(error)}"
            bad.add(unit.name, reason, f"row group {group}, row {done}", row_group=group, rows=rows - done)
            yield DocumentBatch.of([], consumed=size - consumed, skipped=bad.take())


def _open(path: str, name: str) -> pq.ParquetFile:
    stat = None if "://" in path or not Path(path).exists() else Path(path).stat()
    key = (path, stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns))  # so that a replaced file is opened again
    held: tuple[object, pq.ParquetFile] | None = getattr(_last_file, "file", None)
    if held is not None and held[0] == key:
        return held[1]
    # pre_buffer would read the whole column; buffer_size reads a column chunk in pieces.
    file = pq.ParquetFile(open_raw(path, name), pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    _last_file.file = (key, file)
    return file


def _leaves(file: pq.ParquetFile, column: str) -> list[int]:
    """Indices of the leaf columns with that path; field b of struct a has path "a.b"."""
    schema = file.metadata.schema
    return [index for index in range(len(schema)) if schema.column(index).path == column]


def _sizes(file: pq.ParquetFile, column: str) -> list[int]:
    """Bytes of the column in each row group, before compression."""
    meta = file.metadata
    leaf = _leaves(file, column)[0]
    return [meta.row_group(group).column(leaf).total_uncompressed_size for group in range(meta.num_row_groups)]


def _text(array: pa.Array, options: ReadOptions, name: str, group: int, row: int, bad: BadInput) -> pa.Array:
    """The usable rows as a string or large_string array; `row` is the row group's row number of the first."""
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
    if options.max_document_bytes is not None:
        lengths = pc.binary_length(array).to_numpy(zero_copy_only=False)
        long = lengths > options.max_document_bytes
        if long.any():
            place = f"row group {group}, row {numbers[long][0]} with {lengths[long][0]:,} bytes of text"
            bad.add(name, options.too_long(), place, row_group=group, rows=int(long.sum()))
            numbers, array = numbers[~long], array.filter(pa.array(~long))
    try:
        array.validate(full=True)  # Arrow does not check UTF-8 when it reads
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


def _batch(array: pa.Array, **more: Any) -> DocumentBatch:
    """An Arrow text array as a DocumentBatch over the same memory."""
    if len(array) == 0:
        return DocumentBatch.of([], **more)
    _, raw_offsets, data = array.buffers()
    kind = np.int64 if array.type == pa.large_string() else np.int32
    offsets = np.frombuffer(raw_offsets, dtype=kind)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    text = np.frombuffer(data, dtype=np.uint8) if data is not None and data.size else np.empty(0, dtype=np.uint8)
    return DocumentBatch(text, offsets, **more)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
