"""DCLM's CORE (Li et al. 2024, section 3.5), evaluated as nanochat does: 22 tasks of three kinds, most with examples
in the prompt; each task's accuracy is put on a scale from guessing (0) to no mistake (1), and CORE is the mean.

The definition is in the data: core.yaml lists the tasks (file, kind, number of examples in the prompt, delimiter),
eval_meta_data.csv what guessing gives, and a .jsonl file holds a task's questions. Prompts begin with <|endoftext|>.
"""

from __future__ import annotations

import csv
import random
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from gpt2.benchmark.examples import Example, Part, ScoredSequence
from gpt2.benchmark.prompts import Encode, ReaderOutput
from gpt2.benchmark.records import lines, read_records
from gpt2.config.benchmarks import Core
from gpt2.errors import UserError
from gpt2.tokenizer import EOT

TASKS, CHANCES = "core.yaml", "eval_meta_data.csv"
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234  # nanochat's


class Task(BaseModel):
    label: str
    dataset_uri: str
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"]
    num_fewshot: Annotated[list[int], Field(min_length=1)]
    continuation_delimiter: str = " "

    @property
    def shots(self) -> int:
        return self.num_fewshot[0]


class Choice(BaseModel):
    """One question, several answers."""

    query: str
    choices: Annotated[list[str], Field(min_length=2)]
    gold: Annotated[int, Field(ge=0)]


class Schema(BaseModel):
    """Several beginnings, one continuation."""

    context_options: Annotated[list[str], Field(min_length=2)]
    continuation: str
    gold: Annotated[int, Field(ge=0)]


class Completion(BaseModel):
    """One beginning, one continuation, to be produced word for word."""

    context: str
    continuation: str


RECORDS: dict[str, type[BaseModel]] = {
    "multiple_choice": Choice,
    "schema": Schema,
    "language_modeling": Completion,
}


def read(config: Core, files: list[Path], encode: Encode) -> ReaderOutput:
    """A part for each task whose file is there; the others are named in `left_out`.

    Raises:
        UserError: no list of tasks or of what guessing gives, a file that cannot be read, no task at all.
    """
    by_name = {_plain_name(path): path for path in files}
    tasks, chances = _tasks(by_name), _chances(by_name)
    parts: list[Part] = []
    examples: list[Example] = []
    left_out = {}
    for task in tasks:
        path = by_name.get(PurePosixPath(task.dataset_uri).name)
        if path is None or task.label not in chances:
            left_out[task.label] = f"{TASKS if path is None else CHANCES} names {task.dataset_uri}, which is not there"
            if path is not None:
                left_out[task.label] = f"{CHANCES} has no line for it"
            continue
        made = list(_examples(task, path, config.limit, encode))
        examples += made
        form: Literal["last_word", "choice"] = "last_word" if task.icl_task_type == "language_modeling" else "choice"
        parts.append(Part(name=task.label, form=form, examples=len(made), chance=chances[task.label],
                          by="mean" if form == "choice" else "sum",
                          unit="continuation" if form == "last_word" else None))  # fmt: skip
    if not parts:
        raise UserError(f"none of the {len(tasks)} tasks of {TASKS} has its file among {sorted(by_name)}")
    return ReaderOutput(tuple(parts), examples, "core", left_out)


def _plain_name(path: Path) -> str:
    """A fetched file's name without the number that keeps the order."""
    number, _, rest = path.name.partition("-")
    return rest if number.isdigit() and rest else path.name


def _tasks(by_name: dict[str, Path]) -> list[Task]:
    path = _needed(by_name, TASKS)
    try:
        return [Task.model_validate(task) for task in yaml.safe_load("".join(lines(path)))["icl_tasks"]]
    except (yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path} is no list of tasks (icl_tasks): {error}") from error


def _chances(by_name: dict[str, Path]) -> dict[str, float]:
    """Accuracy of guessing by task, from per cent."""
    path = _needed(by_name, CHANCES)
    try:
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(lines(path))}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no column {error}: it needs 'Eval Task' and 'Random baseline'") from error


def _needed(by_name: dict[str, Path], name: str) -> Path:
    if name not in by_name:
        raise UserError(f"CORE needs the file {name}; there is {', '.join(sorted(by_name)) or 'nothing'}")
    return by_name[name]


def _examples(task: Task, path: Path, limit: int | None, encode: Encode) -> Iterator[Example]:
    data: list[Any] = read_records([path], RECORDS[task.icl_task_type])
    random.Random(SHUFFLE_SEED).shuffle(data)
    data = data[:limit]
    if task.shots >= len(data):
        raise UserError(f"{path}: {len(data)} questions are too few to show {task.shots} others before each")
    for number, item in enumerate(data):
        others = [other for index, other in enumerate(data) if index != number]
        shown = random.Random(SHOTS_SEED + number).sample(others, task.shots)
        yield _example(item, shown, task.continuation_delimiter, encode)


def _example(item: Any, shown: list[Any], delimiter: str, encode: Encode) -> Example:
    before = "".join(_whole(other, delimiter) + "\n\n" for other in shown)
    if isinstance(item, Choice):
        rows = [_tokens(encode, before + item.query + delimiter + choice) for choice in item.choices]
        common = _common(rows)  # what the answers have in common is no answer
        return Example([_sequence(row, common) for row in rows], item.gold)
    if isinstance(item, Schema):
        rows = [_tokens(encode, before + option + delimiter + item.continuation) for option in item.context_options]
        scored = _common([row[::-1] for row in rows])
        return Example([_sequence(row, len(row) - scored) for row in rows], item.gold)
    prompt = before + item.context.strip() + delimiter
    whole = _tokens(encode, prompt + item.continuation)
    return Example([_sequence(whole, len(_tokens(encode, prompt.strip())))])


def _whole(item: Any, delimiter: str) -> str:
    """A question with its right answer, as it is shown before another."""
    if isinstance(item, Choice):
        return item.query + delimiter + item.choices[item.gold]
    if isinstance(item, Schema):
        return item.context_options[item.gold] + delimiter + item.continuation
    return item.context.strip() + delimiter + item.continuation


def _tokens(encode: Encode, text: str) -> array[int]:
    """Two bytes a token: all of CORE's prompts are about a hundred million."""
    return array("H", [EOT, *encode(text)])


def _common(rows: list[array[int]]) -> int:
    """How many tokens all rows begin with alike."""
    return next((n for n, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def _sequence(row: array[int], unscored: int) -> ScoredSequence:
    """At least one token is scored and one is not, also where two answers begin alike to the end of one of them."""
    return ScoredSequence(row, min(max(1, len(row) - unscored), len(row) - 1))
