"""The records that a finished run leaves, without the run."""

from __future__ import annotations

from pathlib import Path

from gpt2.config.train import TrainConfig
from gpt2.model.checkpoint import save_model
from gpt2.model.gpt import GPT
from gpt2.stage.directory import provenance
from gpt2.stage.facts import DownloadFacts, EvaluateFacts, Score, TokenizeFacts, TrainFacts
from gpt2.stage.manifest import Manifest, Request, write_model
from gpt2.stage.metrics import MetricsWriter


def store_with_a_training(
    store: Path, model: GPT, *, seed: int = 42, val_loss: float = 3.2511, val_tokens: int = 999
) -> Path:
    """A store as a finished run leaves it, by its records; the train stage's directory.

    Args:
        seed: of the training, to have several in one store.
        val_loss: what its evaluation found.
    """

    def stage(request: Request, facts: object) -> Path:
        directory = store / request.address
        write_model(directory / "request.json", request)
        write_model(directory / "manifest.json", Manifest(address=request.address, files=(), facts=facts))  # type: ignore[arg-type]
        write_model(directory / "provenance.json", provenance(started=0.0))
        return directory

    source = {"kind": "hub", "repo": "HuggingFaceFW/fineweb", "revision": "0" * 40}
    corpus = Request(stage="download", version=1, config={"source": source})
    facts = {"kind": "hub", "text_column": "text", "files": (), "total_bytes": 9}
    stage(corpus, DownloadFacts(**facts, origin="HuggingFaceFW/fineweb@0000"))  # type: ignore[arg-type]
    shards = Request(stage="tokenize", version=1, config={}, inputs={"corpus": corpus.address})
    stage(
        shards,
        TokenizeFacts(
            tokenizer="gpt2", backend="tiktoken", documents=3, train_tokens=123_456, val_tokens=999, shards=()
        ),
    )
    config = TrainConfig.model_validate(
        {
            "model": model.config.model_dump(),
            "optim": {"max_lr": 6e-4, "warmup_steps": 2},
            "total_batch_size": 128,
            "max_steps": 20,
            "seed": seed,
        }
    )
    train = Request(stage="train", version=1, config=config.model_dump(mode="json"), inputs={"shards": shards.address})
    trained = stage(
        train,
        TrainFacts(
            steps=20,
            tokens=2560,
            n_params=model.config.n_params(),
            train_loss=3.1,
            val_loss=3.25,
            train_seconds=30.0,
            total_seconds=36.0,
            tokens_per_second=1234.5,
            flops_per_token=1e6,
            mfu=None,
            device="cpu",
            world_size=1,
            precision="fp32",
            checkpoint="checkpoints/step_00000020",
        ),
    )
    for step in (10, 20):
        save_model(trained / "checkpoints" / f"step_{step:08d}", model)
    metrics = MetricsWriter(trained / "metrics.jsonl")
    for step, loss in ((0, 10.9), (10, 4.5), (20, 3.25)):
        metrics.write(step, **{"val/loss": loss})
    metrics.close()
    evaluate = Request(stage="evaluate", version=1, config={}, inputs={"model": train.address})
    score = Score(acc=0.25, acc_norm=0.2812, examples=1000, chance=0.25)
    stage(evaluate, EvaluateFacts(val_loss=val_loss, val_tokens=val_tokens, scores={"hellaswag": score}))
    return trained
