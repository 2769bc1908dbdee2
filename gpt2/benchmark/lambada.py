"""LAMBADA (Paperno et al. 2016), OpenAI's version: the last word of a passage, with the passage before it.

Right means that the model's likeliest tokens are the word's, all of them. Perplexity is a last word's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, StringConstraints

from gpt2.benchmark.examples import Example, Part
from gpt2.benchmark.prompts import Encode, ReaderOutput, encode_jointly
from gpt2.benchmark.records import read_records
from gpt2.config.benchmarks import Lambada


class LambadaRecord(BaseModel):
    text: Annotated[str, StringConstraints(pattern=r"\S+ \S+")]


def read(config: Lambada, files: list[Path], encode: Encode) -> ReaderOutput:
    """One sequence an example."""
    examples = []
    for record in read_records(files, LambadaRecord, config.limit):
        context, _, word = record.text.rpartition(" ")
        examples.append(Example([encode_jointly(encode, context, word)]))
    part = Part(name="lambada", form="last_word", examples=len(examples), unit="last word")
    return ReaderOutput((part,), examples, "harness")
