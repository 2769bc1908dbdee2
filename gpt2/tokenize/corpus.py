"""Documents from data files, in an order that depends on the files alone.

The files are divided into *units*: some row groups of a parquet file, a byte range of a jsonl or txt file, or a whole
compressed file. Any process that sees the files can read a unit; the documents of all units in order are the corpus.
Reading holds a few megabytes in memory, whatever the size of the file, the row group or (txt) the document. Held whole
are a parquet row, a jsonl line, and text without a place to cut (see reading.last_cut).

    parquet                a row is a document
    jsonl, .gz, .zst       a line holds an object, of which one field is a document
    txt, .gz, .zst         lines that hold only <|endoftext|> separate documents; all other bytes are text; empty
                           documents are skipped

Paths may be fsspec addresses (s3://..., gs://..., memory://...).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from gpt2.errors import UserError
from gpt2.stage.facts import Skipped
from gpt2.tokenize import lines, parquet
from gpt2.tokenize.reading import BadInput, Compression, DocumentBatch, Kind, ReadOptions, WorkUnit

SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}


def kind_of(path: str) -> tuple[Kind, Compression | None]:
    """Format and compression of a file, by its name.

    Raises:
        UserError: an unknown format.
    """
    name = Path(path.lower())
    compression = COMPRESSIONS.get(name.suffix)
    kind = SUFFIXES.get(name.with_suffix("").suffix if compression else name.suffix)
    if kind is None or (kind == "parquet" and compression):
        raise UserError(
            f"{path} has no known suffix: use {', '.join(SUFFIXES)}, the last three also compressed as "
            f"{' or '.join(COMPRESSIONS)}"
        )
    return kind, compression


def divide(files: Iterable[tuple[str, str]], options: ReadOptions) -> tuple[list[WorkUnit], list[Skipped]]:
    """Divide files into units; equal files give equal units.

    Args:
        files: (path or address, name for messages), in reading order.

    Raises:
        UserError: a missing or unreadable file, or one without the text column.
        TransientReadError: reading failed for a reason other than the content, whatever `options` says.
    """
    units: list[WorkUnit] = []
    bad = BadInput(options.on_bad_input)
    for path, name in files:
        kind, compression = kind_of(name)
        if kind == "parquet":
            units += parquet.divide(path, name, options, bad)
        else:
            units += lines.divide(path, name, kind, compression, options)
    return units, bad.take()


def read(unit: WorkUnit, options: ReadOptions) -> Iterator[DocumentBatch]:
    """The documents of a unit, in order, about BATCH_BYTES at a time.

    Raises:
        UserError: unusable input, with the file and the place, unless `options` says to skip it.
        TransientReadError: as `divide`.
    """
    if unit.kind == "parquet":
        return parquet.read(unit, options)
    if unit.kind == "jsonl":
        return lines.read_jsonl(unit, options)
    return lines.read_txt(unit, options)
