"""Trained models in MLflow's model registry: gpt2-<recipe>, the version with the lowest loss as alias `champion`.

    mlflow models serve -m models:/gpt2-124m@champion --env-manager local -p 5002
    curl localhost:5002/invocations -H 'Content-Type: application/json' \\
         -d '{"inputs": ["Once upon a time"], "params": {"tokens": 50}}'

tasks.log_model logs the model in a separate process, because that needs torch.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.config.runtime import Auto
from gpt2.errors import UserError
from gpt2.stage.directory import Provenance, StageDir
from gpt2.stage.facts import EvaluateFacts, TrainFacts
from gpt2.stage.manifest import PROVENANCE, read_model
from tasks import launch
from tasks.environment import child_environment
from tasks.mlflow_content import TRAIN_DIGEST, stage_metrics
from tasks.mlflow_runs import client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
ADDRESS, VAL_LOSS, VALIDATION, RECIPE = "gpt2.address.train", "gpt2.val_loss", "gpt2.validation", "gpt2.recipe"


@dataclass(frozen=True)
class TrainedModel:
    """A finished training, with its evaluation if there is one."""

    train: StageDir
    evaluate: StageDir | None
    recipe: str

    @property
    def name(self) -> str:
        return f"gpt2-{self.recipe}"

    @property
    def address(self) -> str:
        return self.train.request.address

    @property
    def digest(self) -> str:
        manifest = self.train.manifest
        assert manifest is not None
        return manifest.digest

    def matches(self, tags: Mapping[str, str], created_ms: int) -> bool:
        """Whether a version or logged model with `tags` is of this training; without a digest tag, if it is newer."""
        if TRAIN_DIGEST in tags:
            return tags[TRAIN_DIGEST] == self.digest
        return created_ms >= _ended(self.train) * 1000

    @property
    def val_loss(self) -> float:
        if self.evaluate is not None:
            return self.evaluate.facts(EvaluateFacts).val_loss
        return self.train.facts(TrainFacts).val_loss

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the registered version. `gpt2.validation` names the tokens of val_loss; others are not comparable."""
        if self.evaluate is not None:
            tokens = self.evaluate.facts(EvaluateFacts).val_tokens
        else:
            tokens = self.train.request.config["val"]["tokens"]
        return {
            ADDRESS: self.address,
            TRAIN_DIGEST: self.digest,
            RECIPE: self.recipe,
            VAL_LOSS: repr(self.val_loss),
            VALIDATION: f"first {tokens} tokens of {self.train.request.inputs.get('shards', 'unknown shards')}",
        }


def register(
    run_id: str,
    recipe: str,
    train: Path,
    evaluate: Path | None,
    uri: str,
    *,
    upload_seconds: int | Auto = "auto",
    on_line: Callable[[str], None] = print,
) -> str:
    """Log the final model of a training and register it as gpt2-<recipe>, once.

    If it is registered, only tags and metrics are updated. The alias moves to this version if its validation loss is
    lower than that of the version that has it.

    Args:
        run_id: the training's MLflow run.
        train: directory of a finished train stage.
        evaluate: directory of its evaluate stage, or None.
        uri: of the tracking server or database, which is also the registry.
        upload_seconds: see `Runtime`.
        on_line: called with each line of the process that logs the model.

    Returns:
        The version number.

    Raises:
        UserError: a stage is not finished.
        StageFailed: the model could not be logged, or not within `upload_seconds`.
        mlflow.exceptions.MlflowException: MLflow is unreachable.
    """
    trained = TrainedModel(finished_stage(train), finished_stage(evaluate) if evaluate else None, recipe)
    mlflow = client(uri)
    version = find_version(mlflow, trained)
    if version is None:
        seconds = upload_limit(trained.train.facts(TrainFacts).n_params) if upload_seconds == "auto" else upload_seconds
        _log_within(seconds, [run_id, recipe, str(train)], uri, on_line)
        version = find_version(mlflow, trained)
        if version is None:
            raise launch.StageFailed(f"{trained.name} was logged, but the registry at {uri} does not show it")
        on_line(f"registered {trained.name} version {version.version}")
    for key, value in trained.tags.items():
        if version.tags.get(key) != value:
            mlflow.set_model_version_tag(trained.name, version.version, key, value)
    _log_metrics(mlflow, run_id, version, trained)
    _update_champion(mlflow, trained, str(version.version), on_line)
    return str(version.version)


def upload_limit(n_params: int) -> int:
    """Seconds: 300 for imports, export and small requests, plus the fp32 weights at 4 MB/s."""
    return 300 + 4 * n_params // 4_000_000


def _log_within(seconds: int, arguments: list[str], uri: str, on_line: Callable[[str], None]) -> None:
    until = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > until:
            raise launch.StageFailed(
                f"logging the model at {uri} took more than {seconds} s; set runtime.upload_seconds to allow more"
            )

    # One request sends up to 6 GB, which needs a longer time-out than other requests.
    variables = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_TRACKING_URI": uri,
    }
    command = [sys.executable, "-m", "tasks.log_model", *arguments]
    launch.run(command, env=child_environment(overrides=variables), on_line=on_line, on_tick=check, grace_seconds=10)


def finished_stage(path: Path) -> StageDir:
    stage = StageDir(path)
    if stage.manifest is None:
        raise UserError(f"{path} is not finished: only a finished training can be registered")
    return stage


def find_version(mlflow: MlflowClient, trained: TrainedModel) -> ModelVersion | None:
    versions = mlflow.search_model_versions(f"name = '{trained.name}' and tags.`{ADDRESS}` = '{trained.address}'")
    matching = [version for version in versions if trained.matches(version.tags, version.creation_timestamp)]
    return min(matching, key=lambda version: int(version.version), default=None)


def _log_metrics(mlflow: MlflowClient, run_id: str, version: ModelVersion, trained: TrainedModel) -> None:
    """Metrics of training and evaluation on the logged model's page.

    Names, times and steps equal those that tasks.mlflow_sync sends to the run, so MLflow stores each point once.
    """
    from mlflow.entities import Metric

    model_id = str(version.source).removeprefix("models:/")  # search returns versions without model_id
    facts = trained.train.facts(TrainFacts)
    values = stage_metrics(facts)
    stages = [(trained.train, {key: values[key] for key in ("final/train_loss", "final/val_loss")})]
    if trained.evaluate is not None:
        stages.append((trained.evaluate, stage_metrics(trained.evaluate.facts(EvaluateFacts))))
    sent = {metric.key: metric.value for metric in mlflow.get_logged_model(model_id).metrics or []}
    metrics = [
        Metric(key, value, int(_ended(stage) * 1000), facts.steps, model_id=model_id)
        for stage, values in stages
        for key, value in values.items()
        if sent.get(key) != value and math.isfinite(value)
    ]
    if metrics:
        mlflow.log_batch(run_id, metrics=metrics)


def _ended(stage: StageDir) -> float:
    return read_model(stage.path / PROVENANCE, Provenance).ended


def _update_champion(mlflow: MlflowClient, trained: TrainedModel, version: str, on_line: Callable[[str], None]) -> None:
    """Move the alias to `version` if its loss is lower than the champion's, on the same tokens."""
    champion = mlflow.get_registered_model(trained.name).aliases.get(CHAMPION)
    if champion == version:
        return
    if champion is not None:
        current = mlflow.get_model_version(trained.name, champion)
        if current.tags.get(VALIDATION) != trained.tags[VALIDATION]:
            on_line(
                f"{trained.name} version {version} was validated on other tokens than version {champion}, "
                f"which remains {CHAMPION}"
            )
            return
        if float(current.tags.get(VAL_LOSS, "inf")) <= trained.val_loss:
            return
    mlflow.set_registered_model_alias(trained.name, CHAMPION, version)
