"""Measuring a model: validation loss and benchmarks, one after the other, each kept as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gpt2.benchmark.prepared import Examples, load
from gpt2.config.runtime import Runtime
from gpt2.config.section import Section
from gpt2.distributed import World
from gpt2.evaluate.multiple_choice import Sums, picks, score, sequence_sums
from gpt2.evaluate.scoring import OnTokens, TokenLosses
from gpt2.evaluate.validation import val_loss
from gpt2.kernels.fused_gpt import accelerate
from gpt2.model.gpt import GPT
from gpt2.stage.manifest import Score, read_model, write_model

M = TypeVar("M", bound=Section)
BATCH_TOKENS = {"cuda": 32_768, "cpu": 4096}


class Validation(Section):
    val_loss: float
    val_tokens: int


class Chosen(Section):
    """What a model chose in one task, one character an example: for comparing models example by example.

    For choices the number of the answer (0 to 9, then a, b, ...), for last words 1 where right and 0 where not.
    """

    labels: str = ""
    by_sum: str = ""
    by_mean: str = ""
    by_chars: str = ""
    by_bytes: str = ""
    right: str = ""


class Result(Section):
    score: Score
    chosen: dict[str, Chosen]
    """by task; perplexity has none"""
    left_out: Annotated[dict[str, str], Field(exclude_if=lambda tasks: not tasks)] = {}
    """tasks that belong to the benchmark and that its data lacks -> why; not written where there are none"""


class How(NamedTuple):
    """In what way a model is measured."""

    precision: str
    batch_tokens: int
    """input tokens that go through the model at a time, on each process"""
    kernels: Literal["auto", "reference"]


def how(runtime: Runtime, world: World, block_size: int) -> How:
    """Settle what `runtime` leaves to "auto".

    The precision is fp32 then, other than in training: a figure that others are compared with should not depend on
    the kind of GPU, and evaluation is a small part of the work.
    """
    precision = "fp32" if runtime.precision == "auto" else runtime.precision
    if runtime.micro_batch_size == "auto":
        batch_tokens = max(block_size, BATCH_TOKENS.get(world.device.type, 4096))
    else:
        batch_tokens = runtime.micro_batch_size * block_size
    return How(precision, batch_tokens, runtime.kernels)


class Measurement:
    """One model being measured. Every process must ask for the same things in the same order, and gets the same.

    Args:
        kept: folder in which each result is kept, so that an evaluation that is started again goes on; None: nowhere.
    """

    def __init__(
        self, model: GPT, world: World, how: How, kept: Path | None = None, on_tokens: OnTokens | None = None
    ) -> None:
        self.model, self.world, self.how, self.kept, self.on_tokens = model, world, how, kept, on_tokens

    def validation(self, shards: Sequence[Path], tokens: int) -> Validation:
        """The pinned validation loss; see `gpt2.evaluate.validation.val_loss`."""

        def work() -> Validation:
            micro_batch_size = max(1, self.how.batch_tokens // self.model.config.block_size)
            found = val_loss(
                self.model,
                shards,
                tokens,
                micro_batch_size,
                self.world,
                self.how.precision,
                losses_of=self._fast(),
                on_tokens=self.on_tokens,
            )
            return Validation(val_loss=found.loss, val_tokens=found.tokens)

        return self._once("validation", Validation, work)

    def _fast(self) -> TokenLosses | None:
        """The training's own kernels, where they know the precision that was asked for."""
        if self.how.precision != "bf16":
            return None
        runtime = Runtime(precision="bf16", kernels=self.how.kernels)
        return getattr(accelerate(self.model, runtime, self.world.device), "token_losses", None)

    def benchmark(self, name: str, directory: Path) -> Result:
        """The figures and choices of the benchmark prepared in `directory`."""

        def work() -> Result:
            examples = load(directory)
            sums = sequence_sums(
                self.model, examples, self.world, self.how.batch_tokens, self.how.precision, on_tokens=self.on_tokens
            )
            return Result(
                score=score(examples, sums), chosen=chosen(examples, sums), left_out=examples.description.left_out
            )

        return self._once(f"benchmark-{name}", Result, work)

    def _once(self, name: str, model: type[M], work: Callable[[], M]) -> M:
        path = None if self.kept is None else self.kept / f"{quote(name, safe='')}.json"
        there = self.world.broadcast_json(path is not None and self.world.is_main and path.exists())
        if not there:
            began = time.perf_counter()
            result = work()
            if self.world.is_main:
                print(f"{name}: measured in {time.perf_counter() - began:.1f} s", flush=True)
            if path is not None and self.world.is_main:
                write_model(path, result)
            return result
        text = read_model(path, model).model_dump(mode="json") if path is not None and self.world.is_main else None
        return model.model_validate(self.world.broadcast_json(text))


def chosen(examples: Examples, sums: Sums) -> dict[str, Chosen]:
    """What was chosen, by task."""
    found = {}
    for part, among in examples.parts():
        if part.form == "choice":
            picked = picks(examples, sums, among)
            found[part.name] = Chosen(
                labels=digits(examples.labels[among]),
                by_sum=digits(picked.by_sum),
                by_mean=digits(picked.by_mean),
                by_chars=digits(picked.by_chars),
                by_bytes=digits(picked.by_bytes),
            )
        elif part.form == "last_word":
            rows = slice(int(examples.groups[among.start]), int(examples.groups[among.stop]))
            found[part.name] = Chosen(right=digits(sums.greedy[rows].astype(np.int16)))
    return found


def digits(numbers: NDArray[np.int16] | None) -> str:
    """[3, 0, 11] -> "30b"; nothing for None."""
    return "" if numbers is None else "".join(np.base_repr(number, 36).lower() for number in numbers)
