"""A small evaluate stage with a finished training, shards and a benchmark, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import make_shards

from gpt2.benchmark import stage as benchmark
from gpt2.config.benchmarks import Continuation
from gpt2.config.run import EvaluateConfig
from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig
from gpt2.model.checkpoint import save_model
from gpt2.model.gpt import GPT
from gpt2.plan import prepare
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TrainFacts
from gpt2.stage.manifest import Request

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)


def tiny_model() -> GPT:
    model = GPT(TINY)
    model.init_weights(1)
    with torch.no_grad():
        model.transformer.wte.weight[: TINY.vocab_size] *= 20
    return model.eval()


def trained(store: Path, shards: Request, model: GPT) -> Request:
    """A finished train stage with this model for its result."""
    request = Request(stage="train", version=1, config={}, inputs={"shards": shards.address})
    directory = prepare(request, Runtime(store=store))
    save_model(directory / "checkpoints/step_00000001", model)
    facts = TrainFacts(
        steps=1, tokens=1, n_params=model.config.n_params(), train_loss=1.0, val_loss=1.0, train_seconds=1.0,
        total_seconds=1.0, tokens_per_second=1.0, flops_per_token=1.0, mfu=None, device="cpu", world_size=1,
        precision="fp32", checkpoint="checkpoints/step_00000001",
    )  # fmt: skip
    files = [f"checkpoints/step_00000001/{name}" for name in ("model.safetensors", "config.json")]
    StageDir(directory).finish(files, facts)
    return request


def prepared(store: Path, shards: Request) -> Request:
    """A finished benchmark stage over the shards' validation text."""
    config = Continuation(examples=12, context_tokens=16, ending_tokens=8)
    section = config.model_dump(mode="json", exclude={"optional"})
    request = Request(stage="benchmark", version=1, config=section, inputs={"shards": shards.address})
    benchmark.work(StageDir(prepare(request, Runtime(store=store))))
    return request


def evaluation(store: Path, *, val_tokens: int = 500, missing: tuple[str, ...] = (), **runtime: Any) -> Path:
    """An evaluate stage's directory, ready to be started."""
    shards = make_shards(store, tokens=4000, eot=True)
    names = ("held-out", *missing)
    config = EvaluateConfig(val_tokens=val_tokens, benchmarks=names)
    request = Request(
        stage="evaluate",
        version=1,
        config=config.model_dump(mode="json"),
        inputs={
            "model": trained(store, shards, tiny_model()).address,
            "shards": shards.address,
            "benchmark:held-out": prepared(store, shards).address,
        },
        hints={"skipped": dict.fromkeys(missing, "no network")},
    )
    return prepare(request, Runtime(store=store, gpus=0, **runtime))


@pytest.fixture(autouse=True)
def words_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny shards hold no words; any token may begin an ending."""
    from gpt2.benchmark import continuation

    monkeypatch.setattr(continuation, "_begins_word", lambda: np.ones(1 << 16, bool))
