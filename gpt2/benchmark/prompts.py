"""From a context and what follows it to tokens, in the two ways in which the field does that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gpt2.benchmark.examples import Example, Part, ScoredSequence
from gpt2.tokenizer import EOT

Encode = Callable[[str], list[int]]
"""text -> token ids, with special tokens as ordinary text"""


@dataclass(frozen=True)
class ReaderOutput:
    """What a reader returns."""

    parts: tuple[Part, ...]
    examples: list[Example]
    prompt: str
    left_out: dict[str, str] = field(default_factory=dict)


def encode_separately(encode: Encode, context: str, end: str) -> ScoredSequence:
    """As llm.c: context and end are tokenized each by itself, a space before the end."""
    scored = encode(" " + end)
    return _sequence(encode(context), scored, end)


def encode_jointly(encode: Encode, context: str, end: str, delimiter: str = " ") -> ScoredSequence:
    """As lm-evaluation-harness: context and end are tokenized as one text and then divided after as many tokens as
    the context alone has. Spaces at the end of the context go to the end; an empty context is <|endoftext|>.

    Its lengths in characters and bytes are those of the end without the delimiter, as there.
    """
    full = delimiter + end
    stripped = context.rstrip()
    if stripped != context:
        full, context = context[len(stripped) :] + full, stripped
    if not context:
        return _sequence([], encode(full), end)
    before = encode(context)
    return _sequence(before, encode(context + full)[len(before) :], end)


def _sequence(context: list[int], scored: list[int], end: str) -> ScoredSequence:
    return ScoredSequence((context or [EOT]) + scored, len(scored), chars=len(end), bytes=len(end.encode()))
