"""Documents out of data files, in an order that depends on nothing but the files.

The files are divided into *units*: a few row groups of a parquet file, a range of bytes of a jsonl or txt file, the
whole of a compressed one. A unit says where its documents are and can be read by any process that sees the files; the
documents of all units, one after another, are the corpus. Reading keeps a few megabytes in memory, whatever the size of
the file, the row group or (txt) the document; only what cannot be divided is held whole: a row, a line of jsonl, and a
text for as long as it has no space, tab or end of line after anything but white space.

    parquet                a row is a document
    jsonl, .gz, .zst       a line holds an object, of which one field is a document
    txt, .gz, .zst         a file is a document, or several, with lines of nothing but <|endoftext|> between them; every
                           other byte is text, and empty documents are left out

Paths may be addresses that fsspec understands (s3://..., gs://..., memory://...).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from gpt2.errors import UserError
from gpt2.stage.facts import Skipped
from gpt2.tokenize import lines, parquet
from gpt2.tokenize.reading import BadInput, Batch, Compression, Kind, Reading, Unit

SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}


def kind_of(path: str) -> tuple[Kind, Compression | None]:
    """What a file holds and how it is compressed, by its name.

    Raises:
        UserError: another kind of file.
    """
    name = Path(path.lower())
    compression = COMPRESSIONS.get(name.suffix)
    kind = SUFFIXES.get(name.with_suffix("").suffix if compression else name.suffix)
    if kind is None or (kind == "parquet" and compression):
        raise UserError(
            f"{path} is no kind of file that text is read from: {', '.join(SUFFIXES)}, the last three also compressed "
            f"as {' or '.join(COMPRESSIONS)}"
        )
    return kind, compression


def divide(files: Iterable[tuple[str, str]], reading: Reading) -> tuple[list[Unit], list[Skipped]]:
    """Divide files into units; the same files always give the same units.

    Args:
        files: (path or address, name for people), in reading order.

    Raises:
        UserError: a missing or unreadable file, or one without the text column.
        CannotReadNow: a file that may be readable another time, whatever `reading` says.
    """
    units: list[Unit] = []
    bad = BadInput(reading.on_bad_input)
    for path, name in files:
        kind, compression = kind_of(name)
        if kind == "parquet":
            units += parquet.divide(path, name, reading, bad)
        else:
            units += lines.divide(path, name, kind, compression, reading)
    return units, bad.take()


def read(unit: Unit, reading: Reading) -> Iterator[Batch]:
    """The documents of a unit, in order, about BATCH_BYTES at a time.

    Raises:
        UserError: input that cannot be used, unless `reading` says to skip it; it names the file and the place.
        CannotReadNow: as `divide`.
    """
    if unit.kind == "parquet":
        return parquet.read(unit, reading)
    if unit.kind == "jsonl":
        return lines.read_jsonl(unit, reading)
    return lines.read_txt(unit, reading)
