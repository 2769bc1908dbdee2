"""A prepared benchmark on disk: sequences of tokens of which the end is scored. No tokenizer is needed to read one.

Three forms of question are made of such sequences:

- `choice`: an example is several sequences and the number of the right one; their scored ends compete.
- `last_word`: an example is one sequence; right if the model would have written its scored end itself.
- `perplexity`: an example is one sequence of any length, scored in windows.

benchmark.json describes them, examples.npz holds them.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gpt2.atomic import atomic_write
from gpt2.config.section import Section
from gpt2.errors import UserError
from gpt2.stage.manifest import read_model, write_model

DESCRIPTION, EXAMPLES = "benchmark.json", "examples.npz"
Form = Literal["choice", "last_word", "perplexity"]


class ScoredSequence(NamedTuple):
    tokens: list[int] | array[int]
    """what comes before the scored end, at least one token, and the end"""
    scored: int
    """how many tokens the end has"""
    chars: int = 0
    """length of the end's text in characters, without the space before it, where it is scored by characters"""
    bytes: int = 0
    """the same in UTF-8 bytes"""
    units: int = 0
    """perplexity: how many words (or what else `unit` says) the sequence counts for"""


class Example(NamedTuple):
    sequences: list[ScoredSequence]
    label: int = 0


class Part(Section):
    """One task of a benchmark; most have one."""

    name: str
    form: Form
    examples: int
    chance: Annotated[float | None, Field(description="accuracy of guessing")] = None
    by: Annotated[
        Literal["sum", "mean"],
        Field(description="CORE only takes one accuracy of a task: by the summed or mean log probability"),
    ] = "sum"
    unit: Annotated[str | None, Field(description="perplexity: of what")] = None
    stride: Annotated[int | None, Field(description="perplexity: tokens a window moves; None: no overlap")] = None


class Description(Section):
    """benchmark.json"""

    kind: str
    prompt: str
    origin: str
    parts: tuple[Part, ...]
    left_out: dict[str, str] = {}
    """tasks that the benchmark should have and that the data lacks -> why"""


@dataclass(frozen=True)
class Examples:
    """All sequences of a benchmark, the parts one after the other. R sequences in E examples, N tokens."""

    description: Description
    tokens: NDArray[np.uint16]  # (N,)
    starts: NDArray[np.int64]  # (R + 1,) where each sequence begins in `tokens`
    scored: NDArray[np.int32]  # (R,)
    chars: NDArray[np.int32]  # (R,)
    bytes: NDArray[np.int32]  # (R,)
    units: NDArray[np.int64]  # (R,)
    groups: NDArray[np.int64]  # (E + 1,) where each example begins among the sequences
    labels: NDArray[np.int16]  # (E,)

    def lengths(self) -> NDArray[np.int64]:
        """(R,) tokens of each sequence."""
        return np.diff(self.starts)

    def parts(self) -> Iterator[tuple[Part, slice]]:
        """Each part with its range of examples."""
        first = 0
        for part in self.description.parts:
            yield part, slice(first, first + part.examples)
            first += part.examples


def pack(description: Description, examples: Iterable[Example]) -> Examples:
    """Lay examples out as arrays.

    Raises:
        ValueError: a sequence without a token before its scored end, or another number of examples than the
            description says; both are mistakes of a reader.
    """
    tokens = array("H")
    starts, scored, chars, sizes, units = [0], [], [], [], []
    groups, labels = [0], []
    for example in examples:
        for sequence in example.sequences:
            if not 0 < sequence.scored < len(sequence.tokens):
                raise ValueError(f"a sequence of {len(sequence.tokens)} tokens with {sequence.scored} of them scored")
            tokens.extend(sequence.tokens)
            starts.append(len(tokens))
            scored.append(sequence.scored)
            chars.append(sequence.chars)
            sizes.append(sequence.bytes)
            units.append(sequence.units)
        groups.append(len(scored))
        labels.append(example.label)
    if sum(part.examples for part in description.parts) != len(labels):
        raise ValueError(f"{len(labels)} examples, the description says {description.parts}")
    return Examples(
        description=description,
        tokens=np.array(tokens, np.uint16),
        starts=np.array(starts, np.int64),
        scored=np.array(scored, np.int32),
        chars=np.array(chars, np.int32),
        bytes=np.array(sizes, np.int32),
        units=np.array(units, np.int64),
        groups=np.array(groups, np.int64),
        labels=np.array(labels, np.int16),
    )


ARRAYS = ("tokens", "starts", "scored", "chars", "bytes", "units", "groups", "labels")


def save(examples: Examples, directory: Path) -> tuple[str, str]:
    """Write benchmark.json and examples.npz; their names."""
    with atomic_write(directory / EXAMPLES) as file:
        np.savez_compressed(file, **{name: getattr(examples, name) for name in ARRAYS})
    write_model(directory / DESCRIPTION, examples.description)
    return DESCRIPTION, EXAMPLES


def load(directory: Path) -> Examples:
    """Read what `save` wrote.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        description = read_model(directory / DESCRIPTION, Description)
        with np.load(directory / EXAMPLES, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in ARRAYS}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: prepare the benchmark again") from None
    except (ValueError, KeyError, OSError, BadZipFile, zlib.error) as error:
        raise UserError(f"{directory / EXAMPLES} is damaged ({error}): delete {directory} and run again") from error
    return Examples(description=description, **arrays)
