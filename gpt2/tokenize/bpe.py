"""The fast encoder: gpt2/bpe.c, compiled where it runs, and used only as long as it agrees with tiktoken.

Its tables are taken from tiktoken; before it is used, at every start, it has to give tiktoken's tokens for a sample of
difficult text; and while it works, tiktoken encodes about a thousandth of the text again. Where there is no compiler,
or the sample differs, tiktoken does the work: the same bytes, more slowly.
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
from gpt2.tokenize.bpe_tables import kept_tables, vocabulary
from gpt2.tokenize.bpe_test_text import sample_documents
from gpt2.tokenize.encoder import Encoder, TiktokenEncoder
from gpt2.tokenize.reading import BATCH_BYTES, Batch
from gpt2.tokenizer import EOT, gpt2_encoding

SOURCE = Path(__file__).with_name("bpe.c")
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
SLACK = 16  # ids that bpe_encode may write past the last one
CHECKED_SHARE = 1 / 1000
BUFFERS = 24  # of a thread, more than its results that may be waiting to be written
ERRORS = {-1: "memory ran out", -2: "it is 4 GiB or longer without white space"}


_compiling = threading.Lock()


class Unavailable(Exception):
    """There is no fast encoder here; says why."""


def make_encoder(backend: str, *, quiet: bool = False) -> Encoder:
    """The fastest encoder that agrees with tiktoken on this machine.

    Args:
        backend: "auto", or "tiktoken" for tiktoken itself.
        quiet: do not say why the fast one is not used.
    """
    if backend == "tiktoken":
        return TiktokenEncoder()
    try:
        return CheckedEncoder(Kernel(gpt2_encoding()))
    except Unavailable as error:
        if not quiet:
            print(f"tokenize: {error}; tiktoken does the work, to the same bytes but several times slower", flush=True)
        return TiktokenEncoder()


# ----------------------------------------------------------------------------------------------------------- compiling


@cache
def library() -> ctypes.CDLL:
    """bpe.c, compiled at first use and kept in the user's cache under the hash of everything that decides it.

    Raises:
        Unavailable: there is no C compiler, or it refuses.
    """
    with _compiling:  # of several threads that come at once, one compiles and the others find it done
        return _library()


def _library() -> ctypes.CDLL:
    compiler = _compiler()
    if not SOURCE.exists():
        raise Unavailable(f"{SOURCE} was not installed")
    identity = [SOURCE.read_text(), *FLAGS, *compiler, platform.machine(), platform.system()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    path = user_cache("bpe") / f"bpe-{name}.so"
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # the cache may be shared by machines
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


class Kernel:
    """bpe.c with the tables of one vocabulary; any number of threads may call it.

    Args:
        encoding: of up to 65,536 tokens, with GPT-2's pattern.

    Raises:
        Unavailable: it cannot be compiled, or merging alone does not give every token of the vocabulary.
    """

    threads = True

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.name = "bpe.c"
        self._code = library()
        self._local = threading.local()
        self._kept = kept_tables(encoding)  # bpe.c reads the classes where they are
        classes, byte_ids, pairs, merged = (np.ascontiguousarray(table) for table in self._kept)
        self._kept = self._kept._replace(classes=classes)
        handle = self._code.bpe_tables_new(
            classes.ctypes.data, byte_ids.ctypes.data, pairs.ctypes.data, merged.ctypes.data, len(pairs)
        )
        self._tables = _Owned(handle, self._code.bpe_tables_free)
        every = Batch.of(vocabulary(encoding))
        wrong = self._code.bpe_first_unmergeable(
            self._tables.handle, every.data.ctypes.data, every.offsets.ctypes.data, len(every)
        )
        if wrong >= 0:
            raise Unavailable(f"token {wrong} ({every[wrong]!r}) is not what its bytes merge into")

    def encode(self, batch: Batch) -> Tokens:
        """See Encoder. The interpreter's lock is let go of meanwhile.

        Raises:
            UserError: memory ran out, or a piece is too long.
        """
        n_bytes = int(batch.offsets[-1] - batch.offsets[0])
        local = self._local
        if not hasattr(local, "worker"):
            local.worker = _Owned(self._code.bpe_worker_new(self._tables.handle), self._code.bpe_worker_free)
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
    """An array of at least `room` ids of which nobody holds a part any more. Its pages are touched only as far as they
    are used, and then used again: fresh ones would cost as much as a copy."""
    for index in range(len(buffers)):
        if sys.getrefcount(buffers[index]) == _IDLE and len(buffers[index]) >= room:
            return buffers[index]
    buffer = np.empty(max(room, 3 * BATCH_BYTES), dtype=TOKEN)
    if len(buffers) < BUFFERS and room <= 3 * BATCH_BYTES:
        buffers.append(buffer)
    return buffer


_ALONE = [np.empty(0, dtype=TOKEN)]
_IDLE = sys.getrefcount(_ALONE[0])  # of an array that only a list holds


class _Owned:
    """Something of bpe.c's that is freed with this object."""

    keep: Any = None

    def __init__(self, handle: int | None, free: Any) -> None:
        if not handle:
            raise MemoryError("no memory for the encoder's tables")
        self.handle, self._free = handle, free

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._free(self.handle)


class CheckedEncoder:
    """The kernel, watched by tiktoken.

    Raises:
        Unavailable: the kernel does not give tiktoken's tokens for `sample_documents`.
    """

    threads = True

    def __init__(self, kernel: Kernel) -> None:
        self._kernel, self._judge = kernel, TiktokenEncoder()
        self.name = f"bpe.c, checked against {self._judge.name}"
        self._local = threading.local()
        sample = Batch.of([text.encode() for text in sample_documents()])
        if not np.array_equal(kernel.encode(sample), self._judge.encode(sample)):
            raise Unavailable("the fast encoder does not give tiktoken's tokens for the built-in sample")

    def encode(self, batch: Batch) -> Tokens:
        """See Encoder.

        Raises:
            UserError: tiktoken's tokens are others; nothing after the last whole shard was kept.
        """
        tokens = self._kernel.encode(batch)
        local = self._local
        credit: float = getattr(local, "credit", 1 << 16)
        credit += float(batch.offsets[-1] - batch.offsets[0]) * CHECKED_SHARE
        # A document in each batch, whole, as far as the share allows: a long one when enough is saved up.
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

    def _compare(self, batch: Batch, index: int, tokens: Tokens) -> None:
        starts = np.flatnonzero(tokens == EOT) if batch.begins else np.append(-1, np.flatnonzero(tokens == EOT))
        ends = np.append(starts[1:], len(tokens))
        document = batch[index].decode()
        right = self._judge.encode_text(document)
        if not np.array_equal(tokens[starts[index] + 1 : ends[index]], right):
            raise UserError(
                f"the fast encoder and tiktoken differ on {document[:80]!r}... ({len(document):,} characters): "
                f"set tokenize_backend=tiktoken in the runtime and run again, and please report the text"
            )
