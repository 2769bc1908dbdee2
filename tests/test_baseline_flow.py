"""A recipe's baselines through Prefect, to an MLflow run of their own and into the recipe's report."""

from pathlib import Path

import pytest
import torch
from test_pipeline import planned, recipe, run

from gpt2.config import RunConfig
from gpt2.manifest import EvaluateFacts, Manifest, read_model
from gpt2.plan import plan_baseline
from gpt2.recipe import load
from tasks.baseline import record
from tasks.mirror import client, tracking_uri

pytestmark = pytest.mark.slow


def with_baseline(tmp_path: Path) -> tuple[Path, RunConfig]:
    """A toy recipe beside a GPT-2 that transformers has written."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64))
    model.save_pretrained(tmp_path / "theirs")
    path = recipe(tmp_path, "small")
    path.write_text(path.read_text() + f"baselines: {{theirs: {{kind: local-model, path: {tmp_path / 'theirs'}}}}}\n")
    return path, load(str(path))


def test_measured_once_and_drawn_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a baseline measured on other tokens than ours, doubled in MLflow, or never seen by the report."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path, config = with_baseline(tmp_path)
    store = tmp_path / "store"
    run(path, store, module="flows.baseline")
    steps = plan_baseline(config, "theirs", store)
    facts = read_model(store / steps.evaluate.address / "manifest.json", Manifest).facts
    assert isinstance(facts, EvaluateFacts)
    assert facts.val_tokens == 8192
    assert 10.5 < facts.val_loss < 11.2, "random weights know nothing; ln 50257 is 10.82"

    run_id = record(config, "theirs", steps, store)
    mlflow = client(tracking_uri(store))
    (found,) = mlflow.search_runs([e.experiment_id for e in mlflow.search_experiments()])
    assert found.info.run_id == run_id, "the flow has told it already"
    assert found.data.metrics["evaluate/val_loss"] == facts.val_loss
    assert found.data.metrics["evaluate/continuation/acc"] == facts.scores["continuation"].acc

    run(path, store)
    assert "theirs" in (store / planned(path, store).report.address / "report.md").read_text()


def test_a_recipe_without_baselines_says_so(tmp_path: Path) -> None:
    output = run(recipe(tmp_path, "small"), tmp_path / "store", module="flows.baseline", status=2)
    assert "error: small has no baselines" in output
