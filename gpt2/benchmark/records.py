"""Records of a benchmark's files, each checked against what the benchmark must have."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from pydantic import BaseModel, ValidationError

from gpt2.errors import UserError

R = TypeVar("R", bound=BaseModel)


def read_records(files: Iterable[Path], model: type[R], limit: int | None = None) -> list[R]:
    """The records of parquet and JSON-lines files (also .gz, .zst), in order.

    Args:
        limit: only the first so many.

    Raises:
        UserError: a file that cannot be read, a record without a field or with one of another kind, by its number;
            or no record at all.
    """
    found = [_check(record, model, path, number) for path, number, record in islice(_numbered(files), limit)]
    if not found:
        raise UserError(f"{', '.join(str(path) for path in files) or 'no files'}: no records of {model.__name__}")
    return found


def _numbered(files: Iterable[Path]) -> Iterator[tuple[Path, int, Any]]:
    for path in files:
        for number, record in enumerate(raw_records(path), 1):
            yield path, number, record


def raw_records(path: Path) -> Iterator[Any]:
    """The records of one file as they are.

    Raises:
        UserError: it is not what its name says, or of no known kind.
    """
    try:
        if path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        for number, line in enumerate(lines(path), 1):
            if line.strip():
                yield _json(line, path, number)
    except (pa.ArrowException, zstandard.ZstdError, EOFError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): get it again") from error


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, unpacked where its name ends in .gz or .zst."""
    opened: Any = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
    with opened(path, "rb") as packed, io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text:
        yield from text


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from error


def _check(record: Any, model: type[R], path: Path, number: int) -> R:
    try:
        return model.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        what = f"field {field!r}: {message}" if field else message
        has = f"; it has {', '.join(sorted(record))}" if isinstance(record, dict) and first["type"] == "missing" else ""
        raise UserError(f"{path}, record {number} is not as {model.__name__} has it: {what}{has}") from error
