"""Encode random documents with bpe.c and tiktoken until they differ or the time is over.

python -m bench.fuzz_bpe [--seconds N] [--seed N] [--longest N]
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time

import numpy as np

from gpt2.console import command
from gpt2.shards import TOKEN, Tokens
from gpt2.tokenize.bpe import NativeEncoder
from gpt2.tokenize.bpe_test_text import hard_document
from gpt2.tokenize.encoder import TiktokenEncoder
from gpt2.tokenize.lines import to_utf8
from gpt2.tokenize.reading import DocumentBatch
from gpt2.tokenizer import EOT, gpt2_encoding

BATCH = 2000
_SURROGATE = re.compile("[\ud800-\udfff]")
_EOT = np.array([EOT], dtype=TOKEN)


def difference(native: NativeEncoder, reference: TiktokenEncoder, documents: list[str]) -> str | None:
    """The first document whose tokens differ, or None."""
    expected = [_expected(reference, document) for document in documents]
    raw = [to_utf8(document) for document in documents]
    if np.array_equal(native.encode(DocumentBatch.of(raw)), np.concatenate(expected)):
        return None
    for document, text, tokens in zip(documents, raw, expected, strict=True):
        if not np.array_equal(native.encode(DocumentBatch.of([text])), tokens):
            return document
    return "\x00 differs only as a batch: ".join(documents)


def _expected(reference: TiktokenEncoder, document: str) -> Tokens:
    """tiktoken's tokens of a document. It encodes the string, which also tests gpt2.tokenize.lines.to_utf8."""
    if _SURROGATE.search(document):
        tokens = np.array(gpt2_encoding().encode_ordinary(document), dtype=TOKEN)
    else:
        tokens = reference.encode_text(document)  # as encode_ordinary, without its limit of white space
    return np.concatenate((_EOT, tokens))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_bpe")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--longest", type=int, default=120, help="characters of a document, about")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    native, reference = NativeEncoder(gpt2_encoding()), TiktokenEncoder()
    started, last_print, count, size = time.monotonic(), 0.0, 0, 0
    print(f"seed {options.seed}", flush=True)
    while (seconds := time.monotonic() - started) < options.seconds:
        documents = [hard_document(rng, options.longest) for _ in range(BATCH)]
        document = difference(native, reference, documents)
        if document is not None:
            sys.exit(f"error: seed {options.seed}, after {count:,} documents: the encoders differ on {document!r}")
        count += BATCH
        size += sum(map(len, documents))
        if seconds - last_print > 30:
            last_print = seconds
            print(f"{seconds:,.0f} s: {count:,} documents, {size / 1e6:,.0f} M characters, no difference", flush=True)
    print(f"{count:,} documents, {size:,} characters in {seconds:,.0f} s, no difference", flush=True)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
