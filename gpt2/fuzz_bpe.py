"""Random documents through the fast encoder and through tiktoken until a difference is found or time is up.

python -m gpt2.fuzz_bpe [--seconds N] [--seed N] [--longest N]
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import numpy as np

from gpt2.bpe import Kernel
from gpt2.bpe_sample import random_document
from gpt2.corpus import Batch
from gpt2.encoder import TiktokenEncoder
from gpt2.tokenizer import gpt2_encoding

BATCH = 2000


def difference(kernel: Kernel, judge: TiktokenEncoder, documents: list[str]) -> str | None:
    """The first document whose tokens differ, or None."""
    batch = Batch.of([document.encode() for document in documents])
    if np.array_equal(kernel.encode(batch), judge.encode(batch)):
        return None
    for document in documents:
        one = Batch.of([document.encode()])
        if not np.array_equal(kernel.encode(one), judge.encode(one)):
            return document
    return "\x00 only together: ".join(documents)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.fuzz_bpe")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--longest", type=int, default=120, help="characters of a document, about")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    kernel, judge = Kernel(gpt2_encoding()), TiktokenEncoder()
    started, said, count, size = time.monotonic(), 0.0, 0, 0
    print(f"seed {options.seed}", flush=True)
    while (seconds := time.monotonic() - started) < options.seconds:
        documents = [random_document(rng, options.longest) for _ in range(BATCH)]
        found = difference(kernel, judge, documents)
        if found is not None:
            sys.exit(f"error: seed {options.seed}, after {count:,} documents: the encoders differ on {found!r}")
        count += BATCH
        size += sum(map(len, documents))
        if seconds - said > 30:
            said = seconds
            print(f"{seconds:,.0f} s: {count:,} documents, {size / 1e6:,.0f} M characters, no difference", flush=True)
    print(f"{count:,} documents, {size:,} characters in {seconds:,.0f} s, no difference", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
