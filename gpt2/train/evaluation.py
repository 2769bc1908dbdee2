"""Periodic evaluation of a training run: validation loss, a benchmark, text samples. Every rank calls each function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpt2.evaluate.multiple_choice import score_benchmark
from gpt2.evaluate.validation import val_loss
from gpt2.generate.generation import generate
from gpt2.generate.sample import encode_prompt
from gpt2.model.gpt import GPT
from gpt2.tokenizer import EOT, gpt2_encoding
from gpt2.train.trainer import Trainer


def validate(trainer: Trainer, model: GPT) -> None:
    """Mean loss over the first `val.tokens` tokens of the validation shard, in nats per token."""
    loss = val_loss(
        model,
        trainer.val_shards,
        trainer.config.val.tokens,
        trainer.micro_batch_size,
        trainer.world,
        precision=trainer.runtime.precision,
        losses_of=getattr(trainer.loss_fn, "token_losses", None),  # of the fused kernels
    ).loss
    trainer.progress.val_loss = loss if math.isfinite(loss) else None  # JSON has no NaN
    _log(trainer, {"val/loss": loss}, f"val loss {loss:.4f}")


def run_benchmark(trainer: Trainer, model: GPT) -> None:
    """Accuracies on `train.benchmark`."""
    assert trainer.benchmark is not None
    name = trainer.config.benchmark
    score = score_benchmark(model, trainer.benchmark, trainer.world, precision=trainer.runtime.precision)
    metrics = {f"benchmark/{name}/{key}": value for key, value in score.figures().items()}
    _log(trainer, metrics, f"{name} {score.figures()}")


def _log(trainer: Trainer, metrics: dict[str, float], text: str) -> None:
    step, config = trainer.progress.step, trainer.config
    trainer.log.metrics(step, **metrics, **{"train/tokens": float(step * config.total_batch_size)})
    trainer.log.print(f"step {step:,}/{config.max_steps:,}  {text}")


def sample(trainer: Trainer, model: GPT) -> None:
    """Generate one text per prompt on rank 0. The seed depends on the step, so a resumed run writes the same text."""
    config, step = trainer.config.sample, trainer.progress.step
    if not trainer.world.is_main:
        return
    for number, prompt in enumerate(config.prompts):
        with _nondeterministic_algorithms():
            ids = generate(
                model,
                encode_prompt(prompt),
                config.tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=trainer.config.seed + step + number,
                stop=[EOT],
            )
        text = gpt2_encoding().decode([token for token in ids if token != EOT])
        trainer.log.sample(step, prompt, text)
        trainer.log.print(f"step {step:,}  {prompt!r} -> {text!r}")


@contextmanager
def _nondeterministic_algorithms() -> Iterator[None]:
    """Allow operations without a deterministic GPU implementation (cumsum): samples do not affect the weights."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
