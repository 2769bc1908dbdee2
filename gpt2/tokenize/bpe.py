"""The fast encoder: bpe.c, compiled on first use and checked against tiktoken.

Its tables come from tiktoken. At every start it must reproduce tiktoken's tokens for a sample of difficult text; during
the work, tiktoken encodes about a thousandth of the text again. Without a C compiler, or if the sample differs,
tiktoken encodes: the same bytes, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import threading
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gpt2.errors import UserError
from gpt2.machine import environment, user_cache
from gpt2.shards import TOKEN, Tokens
from gpt2.tokenize.bpe_tables import cached_tables, vocabulary
from gpt2.tokenize.bpe_test_text import sample_documents
from gpt2.tokenize.encoder import Encoder, TiktokenEncoder
from gpt2.tokenize.reading import BATCH_BYTES, DocumentBatch
from gpt2.tokenizer import EOT, gpt2_encoding

SOURCE = Path(__file__).with_name("bpe.c")
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
SLACK = 16  # ids that bpe_encode may write after the last one
CHECKED_SHARE = 1 / 1000
MAX_BUFFERS = 24  # per thread, more than the results that may wait to be written
ERRORS = {-1: "out of memory", -2: "it has 4 GiB or more without white space"}
_compiling = threading.Lock()


class Unavailable(Exception):
    """The fast encoder cannot be used; the message is the reason."""


def make_encoder(backend: str, *, quiet: bool = False) -> Encoder:
    """The fastest encoder that agrees with tiktoken on this machine.

    Args:
        backend: "auto", or "tiktoken" for tiktoken itself.
        quiet: do not print why the fast encoder is not used.
    """
    if backend == "tiktoken":
        return TiktokenEncoder()
    try:
        return CheckedEncoder(NativeEncoder(gpt2_encoding()))
    except Unavailable as error:
        if not quiet:
            print(f"tokenize: {error}; tiktoken encodes, to the same bytes but several times slower", flush=True)
        return TiktokenEncoder()


# ----------------------------------------------------------------------------------------------------------- compiling


@cache
def library() -> ctypes.CDLL:
    """bpe.c, compiled on first use and cached per user under the hash of source, flags, compiler and machine.

    Raises:
        Unavailable: there is no C compiler, or it fails.
    """
    with _compiling:  # one thread compiles, the others wait
        return _library()


def _library() -> ctypes.CDLL:
    compiler = _compiler()
    if not SOURCE.exists():
        raise Unavailable(f"{SOURCE} was not installed")
    identity = [SOURCE.read_text(), *FLAGS, *compiler, platform.machine(), platform.system()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    path = user_cache("bpe") / f"bpe-{name}.so"
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # machines may share the cache
        command = [*compiler, *FLAGS, "-o", str(temporary), str(SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
                raise Unavailable(f"the C compiler ({shlex.join(compiler)}) failed: {last}")
            os.replace(temporary, path)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"the C compiler ({shlex.join(compiler)}) failed: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the compiled encoder cannot be loaded ({error}); delete {path}") from error


def _compiler() -> list[str]:
    for candidate in filter(None, (environment("CC"), *COMPILERS)):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise Unavailable("no C compiler (cc) for the fast encoder")


def _declare(code: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    code.bpe_tables_new.restype = code.bpe_worker_new.restype = pointer
    code.bpe_tables_new.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_uint64]
    code.bpe_tables_free.argtypes = code.bpe_worker_new.argtypes = code.bpe_worker_free.argtypes = [pointer]
    code.bpe_tables_free.restype = code.bpe_worker_free.restype = None
    code.bpe_encode.argtypes = [pointer, pointer, pointer, number, ctypes.c_int, pointer]
    code.bpe_first_unmergeable.argtypes = [pointer, pointer, pointer, number]
    code.bpe_encode.restype = code.bpe_first_unmergeable.restype = number
    return code


# ------------------------------------------------------------------------------------------------------------ encoding


class NativeEncoder:
    """bpe.c with the tables of one vocabulary; thread-safe.

    Args:
        encoding: of up to 65,536 tokens, with GPT-2's pattern.

    Raises:
        Unavailable: bpe.c cannot be compiled, or merging alone does not produce every token of the vocabulary.
    """

    threads = True

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.name = "bpe.c"
        self._code = library()
        self._local = threading.local()
        classes, byte_ids, pairs, merged = (np.ascontiguousarray(table) for table in cached_tables(encoding))
        self._classes = classes  # bpe.c does not copy them
        handle = self._code.bpe_tables_new(
            classes.ctypes.data, byte_ids.ctypes.data, pairs.ctypes.data, merged.ctypes.data, len(pairs)
        )
        self._tables = _Handle(handle, self._code.bpe_tables_free)
        tokens = DocumentBatch.of(vocabulary(encoding))
        wrong = self._code.bpe_first_unmergeable(
            self._tables.handle, tokens.data.ctypes.data, tokens.offsets.ctypes.data, len(tokens)
        )
        if wrong >= 0:
            raise Unavailable(f"the bytes of token {wrong} ({tokens[wrong]!r}) do not merge into it")

    def encode(self, batch: DocumentBatch) -> Tokens:
        """See Encoder. Releases the GIL.

        Raises:
            UserError: out of memory, or a piece is too long.
        """
        n_bytes = int(batch.offsets[-1] - batch.offsets[0])
        local = self._local
        if not hasattr(local, "worker"):
            local.worker = _Handle(self._code.bpe_worker_new(self._tables.handle), self._code.bpe_worker_free)
            local.worker.keep = self._tables
            local.buffers = []
        out = _buffer(local.buffers, n_bytes + len(batch) + SLACK)
        count = self._code.bpe_encode(
            local.worker.handle,
            batch.data.ctypes.data,
            batch.offsets.ctypes.data,
            len(batch),
            batch.begins,
            out.ctypes.data,
        )
        if count < 0:
            raise UserError(f"a document of {np.diff(batch.offsets).max():,} bytes cannot be encoded: {ERRORS[count]}")
        return out[:count]


def _buffer(buffers: list[Tokens], room: int) -> Tokens:
    """An array for at least `room` ids that no other object references. Reused, because the page faults of a new array
    cost as much as a copy."""
    for index in range(len(buffers)):
        if sys.getrefcount(buffers[index]) == _IDLE and len(buffers[index]) >= room:
            return buffers[index]
    buffer = np.empty(max(room, 3 * BATCH_BYTES), dtype=TOKEN)
    if len(buffers) < MAX_BUFFERS and room <= 3 * BATCH_BYTES:
        buffers.append(buffer)
    return buffer


_PROBE = [np.empty(0, dtype=TOKEN)]
_IDLE = sys.getrefcount(_PROBE[0])  # reference count of an array that only a list holds


class _Handle:
    """A C object that is freed with this Python object."""

    keep: Any = None

    def __init__(self, handle: int | None, free: Any) -> None:
        if not handle:
            raise MemoryError("no memory for the encoder's tables")
        self.handle, self._free = handle, free

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._free(self.handle)


class CheckedEncoder:
    """A NativeEncoder, checked against tiktoken.

    Raises:
        Unavailable: the tokens of `sample_documents` differ from tiktoken's.
    """

    threads = True

    def __init__(self, native: NativeEncoder) -> None:
        self._native, self._reference = native, TiktokenEncoder()
        self.name = f"bpe.c, checked against {self._reference.name}"
        self._local = threading.local()
        sample = DocumentBatch.of([text.encode() for text in sample_documents()])
        if not np.array_equal(native.encode(sample), self._reference.encode(sample)):
            raise Unavailable("the fast encoder's tokens of the built-in sample differ from tiktoken's")

    def encode(self, batch: DocumentBatch) -> Tokens:
        """See Encoder.

        Raises:
            UserError: tiktoken's tokens differ; nothing after the last whole shard is kept.
        """
        tokens = self._native.encode(batch)
        local = self._local
        credit: float = getattr(local, "credit", 1 << 16)
        credit += float(batch.offsets[-1] - batch.offsets[0]) * CHECKED_SHARE
        # One random whole document per batch, if CHECKED_SHARE of the bytes so far allows it.
        if len(batch):
            if not hasattr(local, "rng"):
                local.rng = random.Random(0)
            index = local.rng.randrange(len(batch))
            length = int(batch.offsets[index + 1] - batch.offsets[index])
            if length <= credit:
                credit -= max(length, 256)
                self._compare(batch, index, tokens)
        local.credit = credit
        return tokens

    def _compare(self, batch: DocumentBatch, index: int, tokens: Tokens) -> None:
        starts = np.flatnonzero(tokens == EOT) if batch.begins else np.append(-1, np.flatnonzero(tokens == EOT))
        ends = np.append(starts[1:], len(tokens))
        document = batch[index].decode()
        expected = self._reference.encode_text(document)
        if not np.array_equal(tokens[starts[index] + 1 : ends[index]], expected):
            raise UserError(
                f"the fast encoder and tiktoken differ on {document[:80]!r}... ({len(document):,} characters): "
                f"set runtime.tokenize_backend=tiktoken and run again, and please report the text"
            )
