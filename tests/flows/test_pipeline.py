"""The whole pipeline from the command line, with real Prefect, MLflow and stages, at a size that trains in seconds."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from toy_recipe import STEPS, command, environment, planned, recipe, run
from waiting import written

from gpt2.plan import Plan
from gpt2.stage.facts import EvaluateFacts, ReportFacts, TrainFacts
from gpt2.stage.manifest import Manifest, read_model

pytestmark = pytest.mark.slow


def task_states(store: Path) -> dict[str, str]:
    """Name of each task run's stage -> state, of the newest flow run."""
    with sqlite3.connect(store / ".prefect" / "prefect.db") as database:
        newest = database.execute("select id from flow_run order by created desc limit 1").fetchone()[0]
        rows = database.execute("select name, state_name from task_run where flow_run_id = ?", (newest,)).fetchall()
    return {name.split()[0]: state for name, state in rows}


def weights(store: Path, steps: Plan) -> dict[str, object]:
    directory = store / steps.train.address
    facts = read_model(directory / "manifest.json", Manifest).facts
    assert isinstance(facts, TrainFacts)
    return load_file(directory / facts.checkpoint / "model.safetensors")


def curve(store: Path, steps: Plan, name: str) -> list[tuple[int, float]]:
    lines = (store / steps.train.address / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line[name]) for line in map(json.loads, lines) if name in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(recipe, store, output) of one whole run without interruption."""
    folder = tmp_path_factory.mktemp("pipeline")
    path, store = recipe(folder, "small"), folder / "store"
    return path, store, run(path, store)


def test_a_whole_run_leaves_a_model_scores_and_a_report(finished: tuple[Path, Path, str]) -> None:
    path, store, output = finished
    steps = planned(path, store)
    losses = dict(curve(store, steps, "val/loss"))
    assert sorted(losses) == [0, 10, 20, 30, 40]
    assert 10.5 < losses[0] < 11.2, "ln 50257 is 10.82: random weights know nothing"
    assert losses[40] < losses[0] - 1.0, "it has learned"
    scores = read_model(store / steps.evaluate.address / "manifest.json", Manifest).facts
    assert isinstance(scores, EvaluateFacts)
    assert scores.val_tokens == 8192
    assert scores.scores["continuation"].examples == 20
    page = store / steps.report.address / "report.html"
    assert "<svg" in page.read_text()
    assert str(page) in output
    headline = read_model(store / steps.report.address / "manifest.json", Manifest).facts
    assert isinstance(headline, ReportFacts)
    assert headline.headline["val_loss"] == scores.val_loss


def test_a_second_run_is_cached_and_adds_nothing_to_mlflow(finished: tuple[Path, Path, str]) -> None:
    path, store, _ = finished
    steps = planned(path, store)
    before = {p: p.stat().st_mtime_ns for p in store.glob("*/*/manifest.json")}
    run(path, store)
    assert task_states(store) == dict.fromkeys(
        ("download", "tokenize", "benchmark", "train", "evaluate", "report"), "Cached"
    )
    assert before == {p: p.stat().st_mtime_ns for p in store.glob("*/*/manifest.json")}
    with sqlite3.connect(store / "mlflow.db") as database:
        runs = database.execute("select run_uuid, status from runs where lifecycle_stage = 'active'").fetchall()
        assert len(runs) == 1, "one MLflow run per recipe"
        assert runs[0][1] == "FINISHED"
        points = database.execute("select step, value from metrics where key = 'val/loss' order by step").fetchall()
    assert [(step, pytest.approx(value)) for step, value in points] == curve(store, steps, "val/loss")


def test_another_learning_rate_and_another_size_share_the_data(finished: tuple[Path, Path, str]) -> None:
    path, store, _ = finished
    large = recipe(path.parent, "large", n_layer=3)
    run(large, store)
    states = task_states(store)
    assert {states[name] for name in ("download", "tokenize", "benchmark")} == {"Cached"}
    assert {states[name] for name in ("train", "evaluate", "report")} == {"Completed"}
    run(path, store, "train.optim.max_lr=1e-3")
    states = task_states(store)
    assert (states["tokenize"], states["train"]) == ("Cached", "Completed")
    with sqlite3.connect(store / "mlflow.db") as database:
        keys = database.execute("select count(distinct run_uuid) from metrics where key = 'train/loss'").fetchone()
    assert keys == (3,)


def test_a_deleted_shard_is_rewritten_and_training_stays_cached(finished: tuple[Path, Path, str]) -> None:
    """The digest of the shards is the same."""
    path, store, _ = finished
    steps = planned(path, store)
    shard = next((store / steps.tokenize.address / "shards").glob("*train*"))
    golden = shard.read_bytes()
    shard.unlink()
    shutil.rmtree(store / steps.report.address)
    run(path, store)
    states = task_states(store)
    assert (states["download"], states["tokenize"], states["train"], states["report"]) == (
        "Cached", "Completed", "Cached", "Completed",
    )  # fmt: skip
    assert shard.read_bytes() == golden


def test_killed_at_random_steps_the_weights_are_the_same(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    """kill -9 of all processes at a random moment, then the same command: the same bits."""
    path, undisturbed, _ = finished
    rng = random.Random(1337)
    store = tmp_path / "store"
    steps = planned(path, store)
    metrics, manifest = store / steps.train.address / "metrics.jsonl", store / steps.train.address / "manifest.json"
    # during preparation, then at three steps of training, each in a new process
    for moment in ("start", *sorted(rng.sample(range(2, STEPS), 3))):
        process = subprocess.Popen(
            command(path, store), env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 200
        if moment == "start":
            while not (store / steps.tokenize.address / "request.json").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.random() * 2)
        else:
            while not manifest.exists() and time.monotonic() < deadline:
                whole = [line for line in written(metrics).splitlines(keepends=True) if line.endswith("}\n")]
                if whole and json.loads(whole[-1])["step"] >= int(moment):
                    break
                time.sleep(0.005)
        assert process.poll() is None, "it exited before the kill"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(path, store)
    ours, theirs = weights(store, steps), weights(undisturbed, steps)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.tobytes() == ours[name].tobytes(), name  # type: ignore[attr-defined]
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert curve(store, steps, name) == curve(undisturbed, steps, name), f"{name}: a step twice or missing"


def test_a_copied_store_still_hits(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, store, _ = finished
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(store, elsewhere, symlinks=True)
    shutil.rmtree(elsewhere / ".prefect")
    run(path, elsewhere)
    assert set(task_states(elsewhere).values()) == {"Cached"}


@pytest.mark.parametrize(
    ("override", "status", "says"),
    [
        ("train.optim.max_lrr=1", 2, "train.optim.max_lrr: no such field; did you mean 'max_lr'?"),
        ("tokenize.val_tokens=100000000", 2, "100,000,000"),
        ("train.init_from=/nowhere/at/all", 2, "/nowhere/at/all"),
        ("download.source={kind: local, paths: [/nowhere/*.parquet]}", 2, "/nowhere"),
    ],
)
def test_an_error_is_one_clear_message(finished: tuple[Path, Path, str], override: str, status: int, says: str) -> None:
    path, store, _ = finished
    output = run(path, store, override, status=status)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert says in errors[0]
    assert "Traceback" not in output


def test_a_cut_off_shard_is_an_error_with_both_numbers(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, store, _ = finished
    source = store / planned(path, store).tokenize.address / "shards"
    for shard in source.iterdir():
        shutil.copy(shard, tmp_path / shard.name)
    victim = sorted(tmp_path.glob("*train*"))[0]
    os.truncate(victim, victim.stat().st_size - 100)
    output = run(path, store, f"download.source={{kind: local-shards, paths: ['{tmp_path}/*.bin']}}", status=2)
    assert f"{victim.name}" in output
    assert "29,950" in output
    assert "30,000" in output
