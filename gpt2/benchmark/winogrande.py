"""WinoGrande (Sakaguchi et al. 2019): which of two names fills the blank?

Scored is the text after the blank, once after each name (partial evaluation, Trinh and Le 2018): it is the same text
both times, so no length has to be made up for, and only acc says something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, StringConstraints

from gpt2.benchmark.examples import Example, Part, ScoredSequence
from gpt2.benchmark.prompts import Encode, ReaderOutput, encode_jointly
from gpt2.benchmark.records import read_records
from gpt2.config.benchmarks import WinoGrande

BLANK = "_"


class WinoGrandeRecord(BaseModel):
    sentence: Annotated[str, StringConstraints(pattern=r"_.*\S")]
    option1: str
    option2: str
    answer: Literal["1", "2"]


def read(config: WinoGrande, files: list[Path], encode: Encode) -> ReaderOutput:
    """Two sequences an example."""
    examples = []
    for record in read_records(files, WinoGrandeRecord, config.limit):
        before, _, after = record.sentence.partition(BLANK)
        sequences = [_unmeasured(encode_jointly(encode, before + option, after.strip()))
                     for option in (record.option1, record.option2)]  # fmt: skip
        examples.append(Example(sequences, int(record.answer) - 1))
    part = Part(name="winogrande", form="choice", examples=len(examples), chance=0.5)
    return ReaderOutput((part,), examples, "harness")


def _unmeasured(sequence: ScoredSequence) -> ScoredSequence:
    return sequence._replace(chars=0, bytes=0)
