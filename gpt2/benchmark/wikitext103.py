"""WikiText-103 (Merity et al. 2016): perplexity a word of Wikipedia articles, as in GPT-2's paper, section 3.1.

WikiText comes tokenized: spaces around punctuation, " @-@ " inside words, <unk> for rare words. GPT-2's paper undoes
that with "invertible de-tokenizers" that it does not list, sums the loss over the tokens of the result, and divides by
the number of words of the *original*, of which each end of a line is one. So the number compares with models of
words. Windows do not overlap by default; the paper does not say what it did.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from gpt2.benchmark.examples import Example, Part, ScoredSequence
from gpt2.benchmark.prompts import Encode, ReaderOutput
from gpt2.benchmark.records import lines, read_records
from gpt2.config.benchmarks import WikiText103
from gpt2.tokenizer import EOT


class WikiTextRecord(BaseModel):
    text: str


def read(config: WikiText103, files: list[Path], encode: Encode) -> ReaderOutput:
    """The whole test set as one sequence, after <|endoftext|>."""
    original = "".join(_text(path) for path in files)
    words = len(original.split()) + original.count("\n")
    tokens = encode(detokenize(original) if config.detokenize else original)
    part = Part(name="wikitext103", form="perplexity", examples=1, unit="word", stride=config.stride)
    return ReaderOutput((part,), [Example([ScoredSequence([EOT, *tokens], len(tokens), units=words)])],
                    "de-tokenized" if config.detokenize else "as it is")  # fmt: skip


def _text(path: Path) -> str:
    """A row or a line is a paragraph, a heading or empty, and ends in a line end."""
    if path.suffix in (".tokens", ".txt"):
        return "".join(lines(path))
    rows = (record.text for record in read_records([path], WikiTextRecord))
    return "".join(row if row.endswith("\n") else row + "\n" for row in rows)


def detokenize(text: str) -> str:
    """Text as people write it from WikiText's: joined numbers and hyphens, punctuation at its word, quotation marks
    and brackets around theirs. Nothing that a reader would miss is lost, but undoing it needs WikiText's rules."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)  # 1 @,@ 000 -> 1,000
    text = re.sub(r" ([,.;:!?%)\]}])", r"\1", text)  # word , -> word,
    text = re.sub(r"([(\[{$£]) ", r"\1", text)
    text = re.sub(r" n't\b", "n't", text)
    text = re.sub(r" '(s|re|ve|ll|d|m|t)\b", r"'\1", text)
    text = re.sub(r"(\w+s) ' ", r"\1' ", text)  # the plural's genitive
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"(?<=\s)' ([^'\n]*?) '(?=\s|[,.;:!?])", r"'\1'", text)
    text = re.sub(r"(?<==) (?==)", "", text)  # = = heading = =
    return re.sub(r"^ | (?=\n)", "", text, flags=re.MULTILINE)
