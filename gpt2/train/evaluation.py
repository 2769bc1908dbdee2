"""What is looked at every so many steps of a training run: validation loss, a benchmark, samples of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpt2.evaluate.multiple_choice import score_benchmark
from gpt2.evaluate.validation import val_loss
from gpt2.generate.generation import generate
from gpt2.generate.sample import encode_prompt
from gpt2.model.gpt import GPT
from gpt2.tokenizer import EOT, gpt2_encoding
from gpt2.train.trainer import Job, is_due


def evaluate(job: Job) -> None:
    """Do what is due after the step that `job` stands at, and write it down. Every process must call it."""
    config, step = job.config, job.progress.step
    tokens = {"train/tokens": float(step * config.total_batch_size)}
    with job.parallel.whole() as model:
        if is_due(config, step, config.val.every):
            job.progress.val_loss = loss = _val_loss(job, model)
            job.records.metrics(step, **{"val/loss": loss}, **tokens)
            job.records.say(f"step {step:,}/{config.max_steps:,}  val loss {loss:.4f}")
        if step and job.benchmark is not None and is_due(config, step, config.benchmark_every):
            score = score_benchmark(model, job.benchmark, job.world, precision=job.precision)
            figures = {f"benchmark/{config.benchmark}/{name}": value for name, value in score.figures().items()}
            job.records.metrics(step, **figures, **tokens)
            job.records.say(f"step {step:,}/{config.max_steps:,}  {config.benchmark} {score.figures()}")
        if step and job.world.is_main and is_due(config, step, config.sample.every):
            with _any_algorithm():
                _sample(job, model)


def _val_loss(job: Job, model: GPT) -> float:
    return val_loss(
        model,
        job.val_shards,
        job.config.val.tokens,
        job.micro_batch_size,
        job.world,
        precision=job.precision,
        losses_of=getattr(job.loss_fn, "token_losses", None),  # the fast path has its own
    ).loss


def _sample(job: Job, model: GPT) -> None:
    """One text a prompt, with a seed of the step's own, so that a resumed run writes the same."""
    config = job.config.sample
    for number, prompt in enumerate(config.prompts):
        ids = generate(
            model,
            encode_prompt(prompt),
            config.tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=job.config.seed + job.progress.step + number,
            stop=[EOT],
        )
        text = gpt2_encoding().decode([token for token in ids if token != EOT])
        job.records.sample(job.progress.step, prompt, text)
        job.records.say(f"step {job.progress.step:,}  {prompt!r} -> {text!r}")


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Allow what torch has no deterministic form of on a GPU (cumulative sums): no weight depends on a sample."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted)
