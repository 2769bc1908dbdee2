"""Metrics, parameters and data set of a stage as MLflow shows them; the names are the same for runs and models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gpt2.plan import Plan
from gpt2.stage.facts import DownloadFacts, EvaluateFacts, HarnessFacts, TokenizeFacts, TrainFacts

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

TRAIN_DIGEST = "gpt2.digest.train"
"""tag of runs and registered models: digest of the training's manifest. Weights trained again at one address differ in
it."""
PARAM_LENGTH = 6000
"""MLflow's limit of characters"""
FINAL = ("train_loss", "val_loss", "tokens", "mfu", "tokens_per_second", "total_seconds", "train_seconds")


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"train": {"optim": {"max_lr": 6e-4}}} -> {"train.optim.max_lr": "0.0006"}; a list is one JSON value."""
    if isinstance(tree, dict) and tree:
        flat: dict[str, str] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: tree if isinstance(tree, str) else json.dumps(tree)}


def stage_metrics(facts: TrainFacts | EvaluateFacts | HarnessFacts) -> dict[str, float]:
    """final/* of a training, evaluate/* of an evaluation, harness/* of lm-evaluation-harness."""
    values: dict[str, float | None]
    if isinstance(facts, TrainFacts):
        values = {f"final/{name}": getattr(facts, name) for name in FINAL}
    elif isinstance(facts, HarnessFacts):
        values = {
            f"harness/{task}/{name}": value
            for task, figures in facts.figures.items()
            for name, value in figures.items()
        }
    else:
        values = {"evaluate/val_loss": facts.val_loss}
        for benchmark, score in facts.scores.items():
            values |= {f"evaluate/{benchmark}/{name}": value for name, value in score.figures().items()}
    return {key: float(value) for key, value in values.items() if value is not None}


def data_set(prefix: str, plan: Plan, shards: TokenizeFacts, corpus: DownloadFacts | None) -> DatasetInput:
    """The training data as MLflow's data set, named after the shards' file prefix."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = {
        "origin": corpus.origin if corpus else "",
        "corpus": plan.download.address,
        "shards": plan.tokenize.address,
    }
    profile = shards.model_dump(mode="json", include={"documents", "train_tokens", "val_tokens", "backend"})
    data = Dataset(
        name=f"{prefix} {shards.train_tokens:,} tokens",
        digest=plan.tokenize.address.rpartition("/")[2],
        source_type="gpt2",
        source=json.dumps(source),
        profile=json.dumps(profile),
    )
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])
