"""From documents to tokens: tiktoken itself, and a faster encoder that tiktoken watches."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from gpt2.shards import TOKEN, Tokens
from gpt2.stage.facts import Skipped
from gpt2.tokenize.corpus import read
from gpt2.tokenize.reading import Batch, Reading, Unit, slices
from gpt2.tokenizer import EOT, gpt2_encoding

_LONG = 50_000
# What the regex engine calls \s, which is not what Python calls it.
_BLANKS = re.compile(f"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{_LONG},}}")


class Encoder(Protocol):
    name: str
    """for the manifest: what makes the tokens, with its version"""
    threads: bool
    """whether several threads of a process encode faster than one"""

    def encode(self, batch: Batch) -> Tokens:
        """The tokens of all documents of a batch, (n,) uint16, with EOT before each one that begins in it."""
        ...


class Encoded(NamedTuple):
    """What became of a part of a unit."""

    tokens: Tokens
    consumed: int
    """bytes of the unit's size that end with it"""
    skipped: tuple[Skipped, ...]


def encode_unit(unit: Unit, reading: Reading, encoder: Encoder) -> Iterator[Encoded]:
    """The tokens of a unit, in order, a few megabytes of text at a time.

    Raises:
        UserError: input that cannot be used (corpus.read), or an encoder that went wrong.
    """
    for batch in read(unit, reading):
        size, skipped = int(batch.offsets[-1] - batch.offsets[0]), tuple(batch.skipped)
        done = told = 0
        for part in slices(batch):  # progress goes on within a long document
            done += int(part.offsets[-1] - part.offsets[0])
            consumed = batch.consumed * done // size if size else batch.consumed
            yield Encoded(encoder.encode(part), consumed - told, skipped)
            told, skipped = consumed, ()


class TiktokenEncoder:
    """tiktoken, document by document."""

    threads = False

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()
        self.name = f"tiktoken {importlib.metadata.version('tiktoken')}"

    def encode(self, batch: Batch) -> Tokens:
        parts = []
        for index in range(len(batch)):
            if index or batch.begins:
                parts.append(np.array([EOT], dtype=TOKEN))
            parts.append(self.encode_text(batch[index].decode()))
        return np.concatenate(parts) if parts else np.empty(0, dtype=TOKEN)

    def encode_text(self, text: str) -> Tokens:
        """What `encode_ordinary` gives, (n,) uint16.

        Its regex engine gives up on about a million white-space characters in a row before text ("StackOverflow"). The
        last of such a run goes with what follows and the others are a piece, so they are encoded by themselves: white
        space to the end of a string is no difficulty.
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
