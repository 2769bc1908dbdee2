"""A recipe's baselines: the flow, their MLflow run, the recipe's report."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures.report_store import Store
from mlflow import MlflowClient
from toy_recipe import planned, recipe, run

from gpt2.config.recipe import load
from gpt2.config.run import RunConfig
from gpt2.plan import plan_baseline
from gpt2.stage.facts import EvaluateFacts, PretrainedFacts
from gpt2.stage.manifest import Manifest, read_model
from tasks.baseline import record_baseline
from tasks.environment import tracking_uri
from tasks.mlflow_runs import client

pytestmark = pytest.mark.slow


def with_baseline(tmp_path: Path) -> tuple[Path, RunConfig]:
    """A toy recipe with a baseline: a random GPT-2 that transformers wrote."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64))
    model.save_pretrained(tmp_path / "theirs")
    path = recipe(tmp_path, "small")
    path.write_text(path.read_text() + f"baselines: {{theirs: {{kind: local-model, path: {tmp_path / 'theirs'}}}}}\n")
    return path, load(str(path))


def test_a_baseline_is_evaluated_once_and_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a baseline evaluated on other tokens, recorded twice in MLflow, or missing in the report."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path, config = with_baseline(tmp_path)
    store = tmp_path / "store"
    run(path, store, module="flows.baseline")
    steps = plan_baseline(config, "theirs", store)
    facts = read_model(store / steps.evaluate.address / "manifest.json", Manifest).facts
    assert isinstance(facts, EvaluateFacts)
    assert facts.val_tokens == 8192
    assert 10.5 < facts.val_loss < 11.2, "random weights know nothing; ln 50257 is 10.82"

    run_id = record_baseline(config, "theirs", steps, store)
    mlflow = client(tracking_uri(store))
    (mlflow_run,) = mlflow.search_runs([e.experiment_id for e in mlflow.search_experiments()])
    assert mlflow_run.info.run_id == run_id, "the flow has recorded it"
    assert mlflow_run.data.metrics["evaluate/val_loss"] == facts.val_loss
    assert mlflow_run.data.metrics["evaluate/continuation/acc"] == facts.scores["continuation"].acc

    run(path, store)
    markdown = (store / planned(path, store).report.address / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    head = next(row for row in rows if "theirs (measured)" in row)
    theirs = {row[0]: row[head.index("theirs (measured)")] for row in rows if len(row) == len(head)}
    score = facts.scores["continuation"]
    assert theirs["validation loss (nats per token)"] == f"{facts.val_loss:.4f}"
    assert theirs["Continuation acc"] == f"{score.acc:.4f}"
    assert theirs["Continuation acc_norm"] == f"{score.acc_norm:.4f}"


def test_an_incomplete_mlflow_run_is_continued(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a server that fails after it created the run gets a second one."""
    _, config = with_baseline(tmp_path)
    steps = plan_baseline(config, "theirs", store)
    files = Store.finish.__get__(SimpleNamespace(path=store))
    files(steps.pretrained, {}, PretrainedFacts(origin="theirs", checkpoint="model"))
    files(steps.evaluate, {}, EvaluateFacts(val_loss=3.5, val_tokens=9))

    def fail(*arguments: object, **named: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", fail)
        with pytest.raises(ConnectionError):
            record_baseline(config, "theirs", steps, store)
    run_id = record_baseline(config, "theirs", steps, store)
    mlflow = client(tracking_uri(store))
    (mlflow_run,) = mlflow.search_runs([each.experiment_id for each in mlflow.search_experiments()])
    assert (mlflow_run.info.run_id, mlflow_run.info.status) == (run_id, "FINISHED")
    assert mlflow_run.data.metrics["evaluate/val_loss"] == 3.5
    assert record_baseline(config, "theirs", steps, store) == run_id


def test_a_recipe_without_baselines_says_so(tmp_path: Path) -> None:
    output = run(recipe(tmp_path, "small"), tmp_path / "store", module="flows.baseline", status=2)
    assert "error: small has no baselines" in output
