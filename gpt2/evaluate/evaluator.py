"""Evaluation of one model: validation loss and benchmarks; each result is saved at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gpt2.benchmark.examples import Examples, load
from gpt2.config.runtime import Runtime
from gpt2.config.section import Section
from gpt2.distributed import World
from gpt2.evaluate.multiple_choice import predict, score
from gpt2.evaluate.sequence_losses import SequenceLosses, sequence_losses
from gpt2.evaluate.token_losses import OnTokens, TokenLosses
from gpt2.evaluate.validation import val_loss
from gpt2.kernels.fused_gpt import accelerate
from gpt2.model.gpt import GPT
from gpt2.stage.facts import Score
from gpt2.stage.manifest import read_model, write_model

M = TypeVar("M", bound=Section)
BATCH_TOKENS = {"cuda": 32_768, "cpu": 4096}


class ValidationResult(Section):
    val_loss: float
    val_tokens: int


class PredictionRecord(Section):
    """Predictions of a model in one task, one character per example, to compare models example by example.

    Multiple choice: the number of the answer in base 36 (0 to 9, then a, b, ...). Last words: 1 if right, else 0.
    """

    labels: str = ""
    by_sum: str = ""
    by_mean: str = ""
    by_chars: str = ""
    by_bytes: str = ""
    right: str = ""


class BenchmarkResult(Section):
    score: Score
    chosen: dict[str, PredictionRecord]
    """by task; none for perplexity"""
    left_out: Annotated[dict[str, str], Field(exclude_if=lambda tasks: not tasks)] = {}
    """task of the benchmark that its data lacks -> reason; omitted from JSON if empty"""


class EvalSettings(NamedTuple):
    precision: str
    batch_tokens: int
    """input tokens per batch and process"""
    kernels: Literal["auto", "reference"]


def eval_settings(runtime: Runtime, world: World, block_size: int) -> EvalSettings:
    """Resolve the "auto" values of `runtime`.

    Precision "auto" is fp32, unlike in training: a score must not depend on the kind of GPU.
    """
    precision = "fp32" if runtime.precision == "auto" else runtime.precision
    if runtime.micro_batch_size == "auto":
        batch_tokens = max(block_size, BATCH_TOKENS.get(world.device.type, 4096))
    else:
        batch_tokens = runtime.micro_batch_size * block_size
    return EvalSettings(precision, batch_tokens, runtime.kernels)


class Evaluator:
    """Evaluates one model. The methods are collective: every process calls them in the same order and gets the result.

    Args:
        cache: folder of finished results, so that an interrupted evaluation resumes; None: nothing is saved.
    """

    def __init__(
        self,
        model: GPT,
        world: World,
        settings: EvalSettings,
        cache: Path | None = None,
        on_tokens: OnTokens | None = None,
    ) -> None:
        self.model, self.world, self.settings, self.cache, self.on_tokens = model, world, settings, cache, on_tokens

    def validation(self, shards: Sequence[Path], tokens: int) -> ValidationResult:
        """Validation loss; see `gpt2.evaluate.validation.val_loss`."""

        def compute() -> ValidationResult:
            micro_batch_size = max(1, self.settings.batch_tokens // self.model.config.block_size)
            result = val_loss(
                self.model,
                shards,
                tokens,
                micro_batch_size,
                self.world,
                self.settings.precision,
                losses_of=self._fused_losses(),
                on_tokens=self.on_tokens,
            )
            return ValidationResult(val_loss=result.loss, val_tokens=result.tokens)

        return self._cached("validation", ValidationResult, compute)

    def _fused_losses(self) -> TokenLosses | None:
        """Token losses by the training kernels, which exist for bf16 only."""
        if self.settings.precision != "bf16":
            return None
        runtime = Runtime(precision="bf16", kernels=self.settings.kernels)
        return getattr(accelerate(self.model, runtime, self.world.device), "token_losses", None)

    def benchmark(self, name: str, directory: Path) -> BenchmarkResult:
        """Score and predictions for the benchmark prepared in `directory`."""

        def compute() -> BenchmarkResult:
            examples = load(directory)
            losses = sequence_losses(
                self.model,
                examples,
                self.world,
                self.settings.batch_tokens,
                self.settings.precision,
                on_tokens=self.on_tokens,
            )
            return BenchmarkResult(
                score=score(examples, losses),
                chosen=prediction_records(examples, losses),
                left_out=examples.description.left_out,
            )

        return self._cached(f"benchmark-{name}", BenchmarkResult, compute)

    def _cached(self, name: str, model: type[M], compute: Callable[[], M]) -> M:
        path = None if self.cache is None else self.cache / f"{quote(name, safe='')}.json"
        saved = read_model(path, model) if path is not None and self.world.is_main and path.exists() else None
        content = self.world.broadcast_json(None if saved is None else saved.model_dump(mode="json"))
        if content is not None:
            return model.model_validate(content)
        started = time.perf_counter()
        result = compute()
        if self.world.is_main:
            print(f"{name}: evaluated in {time.perf_counter() - started:.1f} s", flush=True)
            if path is not None:
                write_model(path, result)
        return result


def prediction_records(examples: Examples, losses: SequenceLosses) -> dict[str, PredictionRecord]:
    """Predictions by task."""
    records = {}
    for part, of_part in examples.parts():
        if part.form == "choice":
            predictions = predict(examples, losses, of_part)
            records[part.name] = PredictionRecord(
                labels=digits(examples.labels[of_part]),
                by_sum=digits(predictions.by_sum),
                by_mean=digits(predictions.by_mean),
                by_chars=digits(predictions.by_chars),
                by_bytes=digits(predictions.by_bytes),
            )
        elif part.form == "last_word":
            rows = slice(int(examples.groups[of_part.start]), int(examples.groups[of_part.stop]))
            records[part.name] = PredictionRecord(right=digits(losses.greedy[rows].astype(np.int16)))
    return records


def digits(numbers: NDArray[np.int16] | None) -> str:
    """Base 36, one character per number: [3, 0, 11] -> "30b"; "" for None."""
    return "" if numbers is None else "".join(np.base_repr(number, 36).lower() for number in numbers)
