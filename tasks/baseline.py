"""Somebody else's model, measured as ours are, as an MLflow run of its own."""

from __future__ import annotations

from pathlib import Path

from gpt2.config import RunConfig
from gpt2.manifest import MANIFEST, PROVENANCE, EvaluateFacts, Manifest, PretrainedFacts, read_model
from gpt2.plan import BaselinePlan
from gpt2.stage import Provenance
from tasks.mirror import client, ensure_experiment, evaluated, tracking_uri


def record(config: RunConfig, name: str, plan: BaselinePlan, store: Path) -> str:
    """Tell MLflow what a finished evaluation of a baseline gave, once; the run's id. A run only begun is gone on with.

    Raises:
        Exception: whatever MLflow raises when it cannot be reached.
    """
    from mlflow.entities import Metric, Param

    uri = tracking_uri(store)
    mlflow = client(uri)
    experiment = ensure_experiment(mlflow, store, uri)
    identity = f"baseline {name} {plan.evaluate.address}"
    found = mlflow.search_runs([experiment], f"tags.`gpt2.identity` = '{identity}'")
    if told := next((run for run in found if run.info.status == "FINISHED"), None):
        return str(told.info.run_id)

    directory = store / plan.evaluate.address
    facts = read_model(directory / MANIFEST, Manifest).facts
    weights = read_model(store / plan.pretrained.address / MANIFEST, Manifest).facts
    assert isinstance(facts, EvaluateFacts) and isinstance(weights, PretrainedFacts)
    ended = int(read_model(directory / PROVENANCE, Provenance).ended * 1000)
    tags = {
        "gpt2.identity": identity,
        "gpt2.recipe": config.name,
        "gpt2.baseline": name,
        **{f"gpt2.address.{stage}": request.address for stage, request in plan.requests().items()},
    }
    # with its tags from the first moment, or a later call would not find it
    run = found[0] if found else mlflow.create_run(experiment, tags=tags, run_name=f"baseline {name}")
    run_id = str(run.info.run_id)
    mlflow.log_batch(
        run_id,
        metrics=[Metric(key, value, ended, 0) for key, value in evaluated(facts).items() if value is not None],
        params=[Param("model", weights.origin), Param("evaluate.val_tokens", str(facts.val_tokens))],
    )
    mlflow.set_terminated(run_id)
    return run_id
