"""HellaSwag (Zellers et al. 2019): which of four endings goes on with a description of an everyday scene?

Two ways of asking, which give different numbers. llm.c takes the text as it is; lm-evaluation-harness puts the
activity before it, cleans WikiHow's markers away and tokenizes context and ending together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from gpt2.benchmark.examples import Example, Part
from gpt2.benchmark.prompts import Encode, ReaderOutput, encode_jointly, encode_separately
from gpt2.benchmark.records import read_records
from gpt2.config.benchmarks import HellaSwag


class HellaSwagRecord(BaseModel):
    ctx: Annotated[str, Field(min_length=1)]
    endings: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=4, max_length=4)]
    label: Annotated[int, Field(ge=0, le=3)]  # the Hub's copy has it as a string, which is read too


class FullRecord(HellaSwagRecord):
    """With what only lm-evaluation-harness's prompt uses."""

    activity_label: str
    ctx_a: str
    ctx_b: str


def read(config: HellaSwag, files: list[Path], encode: Encode) -> ReaderOutput:
    """Four sequences an example: the context with each ending."""
    if config.prompt == "harness":
        examples = [_as_the_harness(record, encode) for record in read_records(files, FullRecord, config.limit)]
    else:
        examples = [
            Example([encode_separately(encode, record.ctx, end) for end in record.endings], record.label)
            for record in read_records(files, HellaSwagRecord, config.limit)
        ]
    part = Part(name="hellaswag", form="choice", examples=len(examples), chance=0.25)
    return ReaderOutput((part,), examples, config.prompt)


def _as_the_harness(record: FullRecord, encode: Encode) -> Example:
    context = clean(f"{record.activity_label}: {record.ctx_a} {record.ctx_b.capitalize()}")
    return Example([encode_jointly(encode, context, clean(end)) for end in record.endings], record.label)


def clean(text: str) -> str:
    """What lm-evaluation-harness does with HellaSwag's texts: a title marker becomes the end of a sentence, other
    markers in brackets go, and so does every second of two spaces."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
