"""Multiple choice made from held-out text: which of four passages goes on with this one?

Every ending is the true one of one example and a wrong one of about three others, so nothing about an ending by itself
gives it away: not its length, not how common its words are, not where it begins. Only the context can tell. All
endings have the same number of tokens and begin with a new word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2.benchmark.examples import Example, Part, ScoredSequence
from gpt2.benchmark.prompts import ReaderOutput
from gpt2.config.benchmarks import Continuation
from gpt2.errors import UserError
from gpt2.shards import open_shard
from gpt2.tokenizer import EOT, gpt2_encoding

CHOICES = 4
SLACK = 16  # an ending may begin so many tokens later than the context is long, at the first new word


def read(config: Continuation, shards: Sequence[Path]) -> ReaderOutput:
    """Four sequences an example, from the validation shards.

    Raises:
        UserError: the text does not give 4 passages of 4 documents.
    """
    stream = np.concatenate([np.asarray(open_shard(path)) for path in shards]) if shards else np.empty(0, np.uint16)
    rng = np.random.default_rng(config.seed)
    passages = _passages(stream, config, rng)
    documents = np.array([document for document, _ in passages])
    if len(set(documents.tolist())) < CHOICES:
        raise UserError(
            f"the validation text has passages of {config.context_tokens + config.ending_tokens + SLACK} tokens from "
            f"{len(set(documents.tolist()))} documents, a benchmark needs {CHOICES}: raise tokenize.val_tokens, or "
            "lower the benchmark's context_tokens and ending_tokens"
        )
    examples = []
    for number, (_, start) in enumerate(passages):
        context = stream[start - config.context_tokens : start].tolist()
        wrong = _others(stream, passages, documents, number, config.ending_tokens, rng)
        label = int(rng.integers(CHOICES))
        starts = [*wrong[:label], start, *wrong[label:]]
        ends = [stream[begin : begin + config.ending_tokens].tolist() for begin in starts]
        examples.append(Example([ScoredSequence(context + end, len(end)) for end in ends], label))
    part = Part(name="continuation", form="choice", examples=len(examples), chance=1 / CHOICES)
    return ReaderOutput((part,), examples, "tokens as they are")


def _passages(stream: NDArray[np.uint16], config: Continuation, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(document, where its ending begins) of up to config.examples passages that do not overlap, in random order."""
    new_word = _begins_word()[stream]
    length = config.context_tokens + SLACK + config.ending_tokens
    borders = np.flatnonzero(stream == EOT)
    found = []
    for document, (first, last) in enumerate(zip([0, *(borders + 1)], [*borders, len(stream)], strict=True)):
        spare = (last - first) % length if last - first >= length else 0
        for begin in range(first + int(rng.integers(spare + 1)), last - length + 1, length):
            candidates = np.flatnonzero(new_word[begin + config.context_tokens :][:SLACK])
            if len(candidates):
                found.append((document, int(begin + config.context_tokens + candidates[0])))
    chosen = rng.permutation(len(found))[: config.examples]
    return [found[index] for index in chosen]


def _others(
    stream: NDArray[np.uint16],
    passages: list[tuple[int, int]],
    documents: NDArray[np.int64],
    number: int,
    length: int,
    rng: np.random.Generator,
) -> list[int]:
    """Where three endings of other documents begin, none of them word for word another or the true one."""
    true = stream[passages[number][1] :][:length]
    seen = {true.tobytes()}
    chosen: list[int] = []
    for other in rng.permutation(np.flatnonzero(documents != documents[number])):
        start = passages[other][1]
        text = stream[start : start + length].tobytes()
        if text not in seen:
            seen.add(text)
            chosen.append(start)
        if len(chosen) == CHOICES - 1:
            return chosen
    raise UserError("the validation text repeats itself: no 3 other endings differ from a true one; take another text")


def _begins_word() -> NDArray[np.bool_]:
    """(65,536,) whether a token is a space and a letter or more."""
    encoding = gpt2_encoding()
    flags = np.zeros(1 << 16, bool)
    for token in range(encoding.n_vocab - 1):  # the last one is <|endoftext|>
        text = encoding.decode_single_token_bytes(token)
        flags[token] = text[:1] == b" " and text[1:2].isalpha()
    return flags
