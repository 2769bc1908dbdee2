"""ARC (Clark et al. 2018): science questions with three to five answers; easy or challenge, as the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from gpt2.benchmark.examples import Example, Part
from gpt2.benchmark.prompts import Encode, ReaderOutput, encode_jointly
from gpt2.benchmark.records import read_records
from gpt2.config.benchmarks import Arc


class Choices(BaseModel):
    text: Annotated[list[str], Field(min_length=2)]
    label: list[str]


class ArcRecord(BaseModel):
    question: str
    choices: Choices
    answerKey: str

    @model_validator(mode="after")
    def _key_is_a_label(self) -> ArcRecord:
        if self.answerKey not in self.choices.label or len(self.choices.label) != len(self.choices.text):
            raise ValueError(f"answerKey {self.answerKey!r} is not one of the labels {self.choices.label}")
        return self


def read(config: Arc, files: list[Path], encode: Encode) -> ReaderOutput:
    """A sequence for each answer: "Question: ...\\nAnswer: ..."."""
    examples, chances = [], []
    for record in read_records(files, ArcRecord, config.limit):
        context = f"Question: {record.question}\nAnswer:"
        sequences = [encode_jointly(encode, context, text) for text in record.choices.text]
        examples.append(Example(sequences, record.choices.label.index(record.answerKey)))
        chances.append(1 / len(sequences))
    part = Part(name="arc", form="choice", examples=len(examples), chance=sum(chances) / len(chances))
    return ReaderOutput((part,), examples, "harness")
