"""Somebody else's model, measured as ours are, as an MLflow run of its own."""

from __future__ import annotations

from pathlib import Path

from gpt2.config.run import RunConfig
from gpt2.plan import BaselinePlan
from gpt2.stage.directory import Provenance
from gpt2.stage.facts import EvaluateFacts, PretrainedFacts
from gpt2.stage.manifest import MANIFEST, PROVENANCE, Manifest, read_model
from tasks.mlflow_runs import client, find_or_create, tracking_uri
from tasks.mlflow_sync import evaluated

MEASURED = "gpt2.digest.evaluate"
"""tag: digest of the evaluation's manifest"""


def record(config: RunConfig, name: str, plan: BaselinePlan, store: Path) -> str:
    """Tell MLflow what a finished evaluation of a baseline gave, once; the run's id. A run only begun is gone on with.

    Raises:
        Exception: whatever MLflow raises when it cannot be reached.
    """
    from mlflow.entities import Metric, Param

    uri = tracking_uri(store)
    mlflow = client(uri)
    tags = {
        "gpt2.recipe": config.name,
        "gpt2.baseline": name,
        **{f"gpt2.address.{stage}": request.address for stage, request in plan.requests().items()},
    }
    identity = f"baseline {name} {plan.evaluate.address}"
    run = find_or_create(mlflow, store, uri, identity, f"baseline {name}", tags)
    run_id = str(run.info.run_id)
    directory = store / plan.evaluate.address
    measured = read_model(directory / MANIFEST, Manifest)
    if run.info.status == "FINISHED" and run.data.tags.get(MEASURED, measured.digest) == measured.digest:
        return run_id

    facts = measured.facts
    weights = read_model(store / plan.pretrained.address / MANIFEST, Manifest).facts
    assert isinstance(facts, EvaluateFacts) and isinstance(weights, PretrainedFacts)
    ended = int(read_model(directory / PROVENANCE, Provenance).ended * 1000)
    mlflow.log_batch(
        run_id,
        metrics=[Metric(key, value, ended, 0) for key, value in evaluated(facts).items() if value is not None],
        params=[Param("model", weights.origin), Param("evaluate.val_tokens", str(facts.val_tokens))],
    )
    mlflow.set_tag(run_id, MEASURED, measured.digest)
    mlflow.set_terminated(run_id)
    return run_id
