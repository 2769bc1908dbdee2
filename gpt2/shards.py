"""Token shards in llm.c's format (*.bin): a header and uint16 tokens.

The header has 256 little-endian int32: magic number, version, number of tokens, zeros. <|endoftext|> precedes every
document; documents continue across shards.

    python -m gpt2.shards FILE...

verifies and describes shards from any source; a folder stands for the *.bin files in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2.atomic import NO_SPACE, fsync_dir
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
    """Statistics over all tokens of a shard."""

    tokens: int
    documents: int
    """number of <|endoftext|>: documents that begin in this shard"""
    largest: int
    """token id; -1 without tokens"""


def header(n_tokens: int) -> bytes:
    """The 1,024 bytes of the header."""
    values = np.zeros(HEADER_INTS, dtype="<i4")
    values[:3] = MAGIC, VERSION, n_tokens
    return values.tobytes()


def read_header(path: Path) -> int:
    """Number of tokens of a shard, after checking its header and the file's size.

    Raises:
        UserError: not a shard, another version, or another size than the header says.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: run again to make it") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a shard: name the *.bin files in it") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(
            f"{path} is no token shard: it has {len(raw):,} bytes, less than a header's {HEADER_BYTES:,}; delete it "
            f"and run again"
        )
    magic, version, n_tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise UserError(f"{path} is no token shard: it begins with {magic}, a GPT-2 shard begins with {MAGIC}")
    if version != VERSION:
        raise UserError(f"shard {path} has version {version}; only version {VERSION} is supported")
    n_held, odd = divmod(size - HEADER_BYTES, TOKEN.itemsize)
    if n_held != n_tokens or odd:
        rest = " and half a token" if odd else ""
        raise UserError(
            f"shard {path}: header says {n_tokens:,} tokens, the file holds {n_held:,}{rest}; delete it and run again"
        )
    return n_tokens


def open_shard(path: Path) -> Tokens:
    """The tokens of a shard, (n_tokens,) uint16, as a read-only memory map.

    Raises:
        UserError: as `read_header`.
    """
    n_tokens = read_header(path)
    if n_tokens == 0:
        return np.empty(0, dtype=TOKEN)  # mmap refuses empty files
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))


def scan(tokens: Tokens, piece: int = 1 << 24) -> ShardStats:
    """Statistics over all tokens, `piece` at a time to bound memory."""
    documents, largest = 0, -1
    for start in range(0, len(tokens), piece):
        part = tokens[start : start + piece]
        documents += int(np.count_nonzero(part == EOT))
        largest = max(largest, int(part.max()))
    return ShardStats(tokens=len(tokens), documents=documents, largest=largest)


def verify(path: Path) -> ShardStats:
    """Check a shard's header, size and every token.

    Raises:
        UserError: as `read_header`, or a token outside GPT-2's vocabulary.
    """
    stats = scan(open_shard(path))
    if stats.largest >= VOCAB_SIZE:
        raise UserError(
            f"shard {path} holds token {stats.largest:,}; GPT-2's vocabulary ends at {VOCAB_SIZE - 1:,}: "
            f"tokenize with GPT-2's tokenizer"
        )
    return stats


class ShardWriter:
    """Writes one shard; the file gets its name when it is complete.

        with ShardWriter(path) as shard:
            shard.write(tokens)

    An exception inside the block deletes the file.
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
        with _report_no_space(self.path):
            self._file.write(np.ascontiguousarray(tokens, dtype=TOKEN).data)
        self.tokens += len(tokens)
        self.documents += int(np.count_nonzero(tokens == EOT))

    def close(self) -> None:
        """Write the header, sync, and rename the file to its name."""
        with _report_no_space(self.path):
            self._file.seek(0)
            self._file.write(header(self.tokens))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._temporary.rename(self.path)
        fsync_dir(self.path.parent)

    def discard(self) -> None:
        with suppress(OSError):  # flushing the buffer may fail
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.discard()


@contextmanager
def _report_no_space(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"no space left for {path}: free some and run again, whole shards are kept") from error


def describe(path: Path, words: int = 12) -> str:
    """Verify a shard and describe it in one line: tokens, documents that begin in it, and its first words.

    Raises:
        UserError: as `verify`.
    """
    stats = verify(path)
    tokens = open_shard(path)
    eot = "" if stats.tokens == 0 or tokens[0] == EOT else "continues a document: "
    text = gpt2_encoding().decode(tokens[: 4 * words].tolist()).replace("<|endoftext|>", " ")
    first = " ".join(text.split()[:words])
    return f"{path}: {stats.tokens:,} tokens, {stats.documents:,} documents begin in it; {eot}{first!r}"


def _describe_all(paths: Iterable[Path]) -> Iterator[tuple[str, bool]]:
    """(line, whether the shard is valid) of every shard."""
    for path in paths:
        files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
        if not files:
            yield f"error: {path} holds no *.bin files: name a folder with shards, or shards", False
        for file in files:
            try:
                yield describe(file), True
            except UserError as error:
                yield f"error: {error}", False


def main(arguments: list[str]) -> None:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        sys.exit("usage: python -m gpt2.shards FILE...")
    all_valid = True
    for line, valid in _describe_all(Path(argument) for argument in arguments):
        print(line, file=sys.stdout if valid else sys.stderr, flush=True)
        all_valid &= valid
    sys.exit(0 if all_valid else 2)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
