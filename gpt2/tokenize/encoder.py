"""The interface of encoders, encoding of a unit, and tiktoken as an encoder."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from gpt2.shards import TOKEN, Tokens
from gpt2.stage.facts import Skipped
from gpt2.tokenize.corpus import read
from gpt2.tokenize.reading import DocumentBatch, ReadOptions, WorkUnit, slices
from gpt2.tokenizer import EOT, gpt2_encoding

_LONG = 50_000
# tiktoken's regex engine's \s, which differs from Python's.
_BLANKS = re.compile(f"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{_LONG},}}")


class Encoder(Protocol):
    name: str
    """with its version, for the manifest"""
    threads: bool
    """whether several threads of one process encode faster than one thread"""

    def encode(self, batch: DocumentBatch) -> Tokens:
        """The tokens of all documents of a batch, (n,) uint16, with EOT before each one that begins in it."""
        ...


class EncodedPart(NamedTuple):
    """The tokens of a part of a unit."""

    tokens: Tokens
    consumed: int
    """bytes of the unit's `size` that this part accounts for"""
    skipped: tuple[Skipped, ...]


def encode_unit(unit: WorkUnit, options: ReadOptions, encoder: Encoder) -> Iterator[EncodedPart]:
    """The tokens of a unit, in order, a few megabytes of text at a time.

    Raises:
        UserError: as corpus.read and Encoder.encode.
    """
    for batch in read(unit, options):
        size, skipped = int(batch.offsets[-1] - batch.offsets[0]), tuple(batch.skipped)
        done = reported = 0
        for part in slices(batch):  # to report progress within a long document
            done += int(part.offsets[-1] - part.offsets[0])
            consumed = batch.consumed * done // size if size else batch.consumed
            yield EncodedPart(encoder.encode(part), consumed - reported, skipped)
            reported, skipped = consumed, ()


class TiktokenEncoder:
    """tiktoken, document by document."""

    threads = False

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()
        self.name = f"tiktoken {importlib.metadata.version('tiktoken')}"

    def encode(self, batch: DocumentBatch) -> Tokens:
        parts = []
        for index in range(len(batch)):
            if index or batch.begins:
                parts.append(np.array([EOT], dtype=TOKEN))
            parts.append(self.encode_text(batch[index].decode()))
        return np.concatenate(parts) if parts else np.empty(0, dtype=TOKEN)

    def encode_text(self, text: str) -> Tokens:
        """The tokens of `encode_ordinary`, (n,) uint16.

        tiktoken's regex engine fails ("StackOverflow") on about a million white-space characters before text. The last
        character of such a run belongs to the text that follows; the others are one piece and are encoded separately,
        as a string that ends with white space does not fail.
        """
        parts, position = [], 0
        if len(text) >= _LONG:
            for run in _BLANKS.finditer(text):
                last = run.end() - 1 if run.end() < len(text) else run.end()
                parts += [self._encode(text[position : run.start()]), self._encode(text[run.start() : last])]
                position = last
        parts.append(self._encode(text[position:]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encode(self, text: str) -> Tokens:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(TOKEN)
