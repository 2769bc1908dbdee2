"""Token shards: llm.c's *.bin files, a header and then uint16 tokens.

Header: 256 little-endian int32, of which the first three are the magic number, the version and the number of tokens.
Every document is preceded by <|endoftext|> and documents run on across shard borders.

    python -m gpt2.shards FILE...

verifies and describes shards, whoever made them; a folder stands for every *.bin in it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2.atomic import fsync_dir
from gpt2.console import command
from gpt2.errors import UserError
from gpt2.tokenizer import EOT, VOCAB_SIZE, gpt2_encoding

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN = np.dtype("<u2")

Tokens = np.ndarray[Any, np.dtype[np.uint16]]


class ShardStats(NamedTuple):
    """What a look at every token of a shard shows."""

    tokens: int
    documents: int
    """number of <|endoftext|>, that is of documents that begin in this shard"""
    largest: int
    """token id, -1 without tokens"""


def header(n_tokens: int) -> bytes:
    """The 1,024 bytes before the tokens."""
    values = np.zeros(HEADER_INTS, dtype="<i4")
    values[:3] = MAGIC, VERSION, n_tokens
    return values.tobytes()


def read_header(path: Path) -> int:
    """Number of tokens of a shard, after checking its header against itself and against the file's size.

    Raises:
        UserError: not a shard, of another version, or of another size than the header says; with the way out.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: run again, it will be made") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a shard: name the *.bin files in it") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(
            f"{path} is no token shard: it holds {len(raw):,} bytes, a header alone has {HEADER_BYTES:,}; "
            f"delete it and run again"
        )
    magic, version, n_tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise UserError(f"{path} is no token shard: it begins with {magic}, a GPT-2 shard begins with {MAGIC}")
    if version != VERSION:
        raise UserError(f"shard {path} has version {version}; this program reads version {VERSION}")
    held, odd = divmod(size - HEADER_BYTES, TOKEN.itemsize)
    if held != n_tokens or odd:
        rest = " and half a token" if odd else ""
        raise UserError(
            f"shard {path}: header says {n_tokens:,} tokens, the file holds {held:,}{rest}; delete it and run again"
        )
    return n_tokens


def open_shard(path: Path) -> Tokens:
    """The tokens of a shard, (n_tokens,) uint16, mapped from the file: read-only, and read only where touched.

    Raises:
        UserError: as `read_header`.
    """
    n_tokens = read_header(path)
    if n_tokens == 0:
        return np.empty(0, dtype=TOKEN)  # an empty mapping is not allowed
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))


def scan(tokens: Tokens, piece: int = 1 << 24) -> ShardStats:
    """Look at every token, `piece` of them at a time so that a mapped shard does not pile up in memory."""
    documents, largest = 0, -1
    for start in range(0, len(tokens), piece):
        part = tokens[start : start + piece]
        documents += int(np.count_nonzero(part == EOT))
        largest = max(largest, int(part.max()))
    return ShardStats(tokens=len(tokens), documents=documents, largest=largest)


def verify(path: Path) -> ShardStats:
    """Check a shard's header, size and every token.

    Raises:
        UserError: as `read_header`, or a token that GPT-2's vocabulary does not have.
    """
    contents = scan(open_shard(path))
    if contents.largest >= VOCAB_SIZE:
        raise UserError(
            f"shard {path} holds token {contents.largest:,}; GPT-2's vocabulary ends at {VOCAB_SIZE - 1:,}: "
            f"it was made with another tokenizer"
        )
    return contents


class ShardWriter:
    """Writes one shard; the file appears under its name only when it is whole.

        with ShardWriter(path) as shard:
            shard.write(tokens)

    The block's end closes it; an exception inside removes what was written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.tokens = 0
        self.documents = 0
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() or discard()
        self._file.write(header(0))

    def write(self, tokens: Tokens) -> None:
        """Append tokens, (n,) uint16.

        Raises:
            UserError: no space is left on the device.
        """
        with _disk_full_as_user_error(self.path):
            self._file.write(np.ascontiguousarray(tokens, dtype=TOKEN).data)
        self.tokens += len(tokens)
        self.documents += int(np.count_nonzero(tokens == EOT))

    def close(self) -> None:
        """Put the right header in, bring all to disk, and give the file its name."""
        with _disk_full_as_user_error(self.path):
            self._file.seek(0)
            self._file.write(header(self.tokens))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._temporary.rename(self.path)
        fsync_dir(self.path.parent)

    def discard(self) -> None:
        with suppress(OSError):  # what is still buffered may not fit
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.discard()


@contextmanager
def _disk_full_as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space left for {path}: free some and run again, whole shards are kept") from error


def describe(path: Path, words: int = 12) -> str:
    """Verify a shard and put it into one line: tokens, documents that begin in it, and its first words.

    Raises:
        UserError: as `verify`.
    """
    contents = verify(path)
    tokens = open_shard(path)
    eot = "" if contents.tokens == 0 or tokens[0] == EOT else "goes on in a document: "
    text = gpt2_encoding().decode(tokens[: 4 * words].tolist()).replace("<|endoftext|>", " ")
    first = " ".join(text.split()[:words])
    return f"{path}: {contents.tokens:,} tokens, {contents.documents:,} documents begin in it; {eot}{first!r}"


def _describe_all(paths: Iterable[Path]) -> Iterator[tuple[str, bool]]:
    for path in paths:
        found = sorted(path.glob("*.bin")) if path.is_dir() else [path]
        if not found:
            yield f"error: no shard lies in {path}: name a folder that holds *.bin files, or such files", False
        for file in found:
            try:
                yield describe(file), True
            except UserError as error:
                yield f"error: {error}", False


def main(arguments: list[str]) -> None:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        sys.exit("usage: python -m gpt2.shards FILE...")
    good = True
    for line, fine in _describe_all(Path(argument) for argument in arguments):
        print(line, file=sys.stdout if fine else sys.stderr, flush=True)
        good &= fine
    sys.exit(0 if good else 2)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
