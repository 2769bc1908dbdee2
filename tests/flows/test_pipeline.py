"""The whole pipeline, as a person starts it: real Prefect, real MLflow, real processes, real files.

Every run here is a process of its own started by the command line, at a size that trains in seconds.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file
from waiting import written

from gpt2.config.recipe import load
from gpt2.plan import Plan, plan
from gpt2.stage.facts import EvaluateFacts, ReportFacts, TrainFacts
from gpt2.stage.manifest import Manifest, read_model

pytestmark = pytest.mark.slow

STEPS = 40
TOY = {
    "download": {"source": {"kind": "installed-docs", "max_bytes": 400_000}},
    "tokenize": {"prefix": "docs", "shard_tokens": 30_000, "val_tokens": 20_000},
    "benchmarks": {"continuation": {"kind": "continuation", "examples": 20, "context_tokens": 24, "ending_tokens": 12}},
    "evaluate": {"val_tokens": 8192, "benchmarks": ["continuation"]},
}
TRAIN = {
    "optim": {"max_lr": 3.0e-3, "warmup_steps": 4},
    "total_batch_size": 512,
    "max_steps": STEPS,
    "val": {"every": 10, "tokens": 4096},
    "benchmark": "continuation",
    "benchmark_every": 20,
    "sample": {"every": 20, "tokens": 8},
    "checkpoint": {"every": 10},
}


def recipe(folder: Path, name: str, **model: int) -> Path:
    """conf/<name>.yaml at toy size."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, **model}
    tree = {"name": name, **TOY, "train": {**TRAIN, "model": shape}, "report": {"title": f"Toy {name}"}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(path: Path, store: Path, *overrides: str, module: str = "flows.reproduce") -> list[str]:
    words = [sys.executable, "-m", module, str(path), f"runtime.store={store}", "runtime.log_every=1"]
    return [*words, *overrides]


def environment() -> dict[str, str]:
    """As in a shell that knows of no server."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}


def run(path: Path, store: Path, *overrides: str, status: int = 0, module: str = "flows.reproduce") -> str:
    """Run the pipeline to its end and return what it printed."""
    done = subprocess.run(
        command(path, store, *overrides, module=module), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def planned(path: Path, store: Path, **overrides: object) -> Plan:
    return plan(load(str(path), overrides), store)


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
    """(recipe, store, output) of one whole run that nothing disturbed."""
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


def test_again_does_no_work_and_doubles_nothing(finished: tuple[Path, Path, str]) -> None:
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
        assert len(runs) == 1, "the same recipe again is the same MLflow run"
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


def test_a_deleted_stage_is_made_again_and_what_follows_is_kept(finished: tuple[Path, Path, str]) -> None:
    """Its content is the same, so nothing after it is stale."""
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


def test_killed_anywhere_any_number_of_times_it_ends_in_the_same_weights(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """The promise of the product: kill -9 of everything at any moment, the same command again, the same bits."""
    path, undisturbed, _ = finished
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = tmp_path / "store"
    steps = planned(path, store)
    metrics, manifest = store / steps.train.address / "metrics.jsonl", store / steps.train.address / "manifest.json"
    # moments: while preparing, then at three steps of training, each met in a new process
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
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(path, store)
    ours, theirs = weights(store, steps), weights(undisturbed, steps)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.tobytes() == ours[name].tobytes(), name  # type: ignore[attr-defined]
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert curve(store, steps, name) == curve(undisturbed, steps, name), f"{name}: no step doubled, none missing"


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
