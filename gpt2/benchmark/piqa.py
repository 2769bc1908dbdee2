"""PIQA (Bisk et al. 2020): which of two solutions reaches a goal in the physical world?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from gpt2.benchmark.examples import Example, Part
from gpt2.benchmark.prompts import Encode, ReaderOutput, encode_jointly
from gpt2.benchmark.records import read_records
from gpt2.config.benchmarks import Piqa


class PiqaRecord(BaseModel):
    goal: str
    sol1: str
    sol2: str
    label: Annotated[int, Field(ge=0, le=1)]


def read(config: Piqa, files: list[Path], encode: Encode) -> ReaderOutput:
    """Two sequences an example: "Question: ...\\nAnswer: ..."."""
    examples = []
    for record in read_records(files, PiqaRecord, config.limit):
        context = f"Question: {record.goal}\nAnswer:"
        examples.append(
            Example([encode_jointly(encode, context, end) for end in (record.sol1, record.sol2)], record.label)
        )
    part = Part(name="piqa", form="choice", examples=len(examples), chance=0.5)
    return ReaderOutput((part,), examples, "harness")
