"""Tables for bpe.c, taken from tiktoken: character classes and merges."""

from __future__ import annotations

import hashlib
import importlib.metadata
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from gpt2.atomic import atomic_write
from gpt2.errors import UserError
from gpt2.machine import user_cache

CODE_POINTS = 0x110000
CLASSES = {1: r"\p{L}+", 2: r"\p{N}+", 3: r"\s+"}  # bpe.c's LETTER, NUMBER, SPACE; 0 is any other character

Array = np.ndarray[Any, np.dtype[Any]]


class Tables(NamedTuple):
    classes: Array
    """(0x110000,) uint8"""
    byte_ids: Array
    """(256,) uint16: the token of each byte"""
    pairs: Array
    """(n,) uint32: left id << 16 | right id, for all pairs whose concatenation is a token"""
    merged: Array
    """(n,) uint16: the token of each pair"""


def build_tables(encoding: tiktoken.Encoding) -> Tables:
    """Tables for a vocabulary of up to 65,536 tokens."""
    ranks = {token: rank for rank, token in _tokens(encoding)}
    pairs, merged = [], []
    # tiktoken merges any neighbours whose concatenation is a token, not only the pairs of training.
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                pairs.append(left << 16 | right)
                merged.append(rank)
    byte_ids = [ranks[bytes([byte])] for byte in range(256)]
    return Tables(
        classes=character_classes(),
        byte_ids=np.array(byte_ids, dtype=np.uint16),
        pairs=np.array(pairs, dtype=np.uint32),
        merged=np.array(merged, dtype=np.uint16),
    )


def cached_tables(encoding: tiktoken.Encoding) -> Tables:
    """As `build_tables`, cached per user under the hash of vocabulary, tiktoken's version and this module: saves 0.25 s
    per start. The zip format's checksums are verified."""
    key = hashlib.sha256(importlib.metadata.version("tiktoken").encode() + Path(__file__).read_bytes())
    for token in vocabulary(encoding):
        key.update(len(token).to_bytes(4, "little") + token)
    path = user_cache("bpe") / f"tables-{key.hexdigest()[:16]}.npz"
    try:
        with np.load(path) as arrays:
            return Tables(**{name: arrays[name] for name in Tables._fields})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        result = build_tables(encoding)
    with suppress(OSError, UserError), atomic_write(path) as file:
        np.savez(file, **result._asdict())
    return result


def vocabulary(encoding: tiktoken.Encoding) -> list[bytes]:
    """All mergeable tokens in the order of their ids."""
    return [token for _, token in _tokens(encoding)]


def _tokens(encoding: tiktoken.Encoding) -> list[tuple[int, bytes]]:
    special = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    ids = (number for number in range(encoding.n_vocab) if number not in special)
    return [(number, encoding.decode_single_token_bytes(number)) for number in ids]


def character_classes() -> Array:
    """The class of every code point in tiktoken's regex engine, whose Unicode version differs from Python's: the
    matches of each class's pattern in a text of all code points. Surrogates have class 0."""
    text = "".join(chr(code) for code in range(CODE_POINTS) if not 0xD800 <= code < 0xE000)
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    classes = np.zeros(CODE_POINTS, dtype=np.uint8)
    for number, pattern in CLASSES.items():
        engine = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=bytes_only, special_tokens={})
        members = bytes(engine.encode_ordinary(text)).decode()
        classes[np.frombuffer(members.encode("utf-32-le"), dtype=np.uint32)] = number
    return classes
