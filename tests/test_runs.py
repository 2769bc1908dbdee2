"""Which finished model a recipe's name stands for."""

from pathlib import Path
from typing import Any

import pytest

from gpt2.config.recipe import load
from gpt2.config.runtime import Runtime
from gpt2.errors import UserError
from gpt2.plan import plan, prepare
from gpt2.runs import find, trainings
from gpt2.stage.directory import Provenance, StageDir
from gpt2.stage.facts import TrainFacts
from gpt2.stage.manifest import read_model, write_model


def train(store: Path, ended: float, recipe: str = "124m", **overrides: Any) -> Path:
    """The directory of a finished training."""
    config = load(recipe, {key.replace("__", "."): value for key, value in overrides.items()})
    path = prepare(plan(config, store).train, Runtime(store=store))
    facts = TrainFacts(
        steps=1, tokens=1, n_params=1, train_loss=3.0, val_loss=3.25, train_seconds=1.0, total_seconds=1.0,
        tokens_per_second=1.0, flops_per_token=1.0, mfu=None, device="cpu", world_size=1, precision="fp32",
        checkpoint="checkpoints/step_00000001",
    )  # fmt: skip
    StageDir(path).finish([], facts)
    record = read_model(path / "provenance.json", Provenance)
    write_model(path / "provenance.json", record.model_copy(update={"ended": ended}))
    return path


def test_a_run_with_overrides_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: after it, the recipe's name found nothing and gave the advice to run the recipe."""
    store = f"runtime.store={tmp_path}"
    with pytest.raises(UserError, match="none: run the recipe first"):
        find("124m", [store])
    seven = train(tmp_path, 2.0, train__seed=7)
    eight = train(tmp_path, 3.0, train__seed=8)
    train(tmp_path, 4.0, recipe="350m")
    assert [training.directory for training in trainings("124m", tmp_path)] == [eight, seven]
    assert find("124m", [store]) == eight / "checkpoints" / "step_00000001"
    assert "train.seed=8" in capsys.readouterr().err
    assert find("124m", [store, "train.seed=7"]).parent.parent == seven
    with pytest.raises(UserError, match=r"train\.seed=9.*train\.seed=8.*train\.seed=7"):
        find("124m", [store, "train.seed=9"])
    plain = train(tmp_path, 1.0)
    assert find("124m", [store]).parent.parent == plain, "the recipe as it stands comes before newer experiments"
