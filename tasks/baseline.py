"""The MLflow run of a baseline: a pretrained model, evaluated by the same code as the recipe's model."""

from __future__ import annotations

from pathlib import Path

from gpt2.config.run import RunConfig
from gpt2.plan import BaselinePlan
from gpt2.stage.directory import Provenance
from gpt2.stage.facts import EvaluateFacts, PretrainedFacts
from gpt2.stage.manifest import MANIFEST, PROVENANCE, Manifest, read_model
from tasks.environment import tracking_uri
from tasks.mlflow_content import stage_metrics
from tasks.mlflow_runs import client, find_or_create

EVALUATE_DIGEST = "gpt2.digest.evaluate"
"""tag: digest of the evaluation's manifest"""


def record_baseline(config: RunConfig, name: str, plan: BaselinePlan, store: Path) -> str:
    """Send a baseline's finished evaluation to its MLflow run, unless the run has it; the run's ID.

    Raises:
        Exception: any error of MLflow's client.
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
    manifest = read_model(directory / MANIFEST, Manifest)
    if run.info.status == "FINISHED" and run.data.tags.get(EVALUATE_DIGEST, manifest.digest) == manifest.digest:
        return run_id

    facts = manifest.facts
    weights = read_model(store / plan.pretrained.address / MANIFEST, Manifest).facts
    assert isinstance(facts, EvaluateFacts) and isinstance(weights, PretrainedFacts)
    ended = int(read_model(directory / PROVENANCE, Provenance).ended * 1000)
    mlflow.log_batch(
        run_id,
        metrics=[Metric(key, value, ended, 0) for key, value in stage_metrics(facts).items()],
        params=[Param("model", weights.origin), Param("evaluate.val_tokens", str(facts.val_tokens))],
    )
    mlflow.set_tag(run_id, EVALUATE_DIGEST, manifest.digest)
    mlflow.set_terminated(run_id)
    return run_id
