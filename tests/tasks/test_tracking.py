"""MLflow agrees with the store: each point once, on one run, without delaying the stages."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from waiting import free_port, wait_for

from flows.services import run_summary
from gpt2.config.recipe import load
from gpt2.config.run import RunConfig
from gpt2.config.runtime import Runtime
from gpt2.plan import Plan, plan, prepare
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TrainFacts
from gpt2.stage.manifest import METRICS
from gpt2.stage.metrics import MetricsWriter, cut_after_step, read_metrics
from tasks.environment import experiment_name
from tasks.mlflow_content import flatten
from tasks.mlflow_runs import IDENTITY
from tasks.mlflow_sync import ABANDONED, REPLACES, MlflowRunSync
from tasks.tracking import Tracking

pytestmark = pytest.mark.slow  # an MLflow database


class Pipeline:
    """A recipe in a store, whose stages can be run without Prefect."""

    def __init__(self, store: Path, **overrides: Any) -> None:
        self.store = store
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        self.config: RunConfig = load("demo", {"train.max_steps": 30, **given})
        self.plan: Plan = plan(self.config, store)
        self.metrics = store / self.plan.train.address / METRICS

    def run(self, *names: str) -> None:
        for name, request in self.plan.requests().items():
            if name in names or not names:
                directory = prepare(request, Runtime(store=self.store))
                subprocess.run([sys.executable, "-m", "fake_stages", str(directory)], check=True)

    def mlflow_run(self, **tags: str) -> MlflowRunSync:
        return MlflowRunSync(self.config, self.plan, self.store, tags)


@pytest.fixture
def pipeline(store: Path, fake_stages: Callable[..., None]) -> Pipeline:
    return Pipeline(store)


def client(store: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{store}/mlflow.db")


def runs(store: Path) -> list[Any]:
    mlflow = client(store)
    experiment = mlflow.get_experiment_by_name(experiment_name())
    return list(mlflow.search_runs([experiment.experiment_id])) if experiment else []


def steps(store: Path, run_id: str, key: str) -> list[int]:
    return sorted(metric.step for metric in client(store).get_metric_history(run_id, key))


# ---------------------------------------------------------------------------------------------------------- the run


def test_everything_is_on_one_run(pipeline: Pipeline) -> None:
    pipeline.run()
    pipeline.mlflow_run(**{"prefect.flow_run": "http://127.0.0.1:4200/runs/flow-run/1"}).sync()
    (run,) = runs(pipeline.store)
    assert run.info.run_name == f"demo {pipeline.plan.train.address[6:14]}"
    assert run.data.params["train.optim.max_lr"] == "0.003"
    assert run.data.params["train.optim.betas"] == "[0.9, 0.95]"
    for name, request in pipeline.plan.requests().items():
        assert run.data.tags[f"gpt2.address.{name}"] == request.address
    assert run.data.tags["prefect.flow_run"].endswith("/runs/flow-run/1")
    assert run.data.tags["prefect.flow_run"] in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["final/val_loss"] == 2.0
    assert run.data.metrics["evaluate/continuation/acc_norm"] == 0.35
    assert steps(pipeline.store, run.info.run_id, "train/loss") == list(range(1, 31))
    assert steps(pipeline.store, run.info.run_id, "val/loss") == list(range(2, 31, 2))
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "docs 50 tokens" and data.dataset.digest == pipeline.plan.tokenize.address[9:]
    artifacts = client(pipeline.store).list_artifacts(run.info.run_id, "report")
    assert {artifact.path for artifact in artifacts} == {"report/report.md", "report/report.html", "report/plots"}
    assert run.info.artifact_uri.startswith((pipeline.store / "mlartifacts").as_uri())


def test_the_times_are_those_of_the_file(pipeline: Pipeline) -> None:
    """Bug: a point sent again with another time is stored twice."""
    pipeline.run("download", "tokenize", "benchmark-continuation", "train")
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    assert mlflow_run.run_id
    history = client(pipeline.store).get_metric_history(mlflow_run.run_id, "train/loss")
    lines = [json.loads(line) for line in pipeline.metrics.read_text().splitlines()]
    assert {m.step: m.timestamp for m in history} == {
        line["step"]: int(line["time"] * 1000) for line in lines if "train/loss" in line
    }


def test_a_second_sync_changes_nothing(pipeline: Pipeline) -> None:
    pipeline.run()
    first = pipeline.mlflow_run()
    first.sync()
    before = runs(pipeline.store)[0].to_dictionary()
    first.sync()
    pipeline.mlflow_run().sync()
    assert runs(pipeline.store)[0].to_dictionary() == before
    assert len(steps(pipeline.store, before["info"]["run_id"], "train/loss")) == 30


def test_without_local_records_mlflow_gives_the_last_step(pipeline: Pipeline) -> None:
    """Bug: a store copied without .mlflow sends each point again."""
    pipeline.run()
    pipeline.mlflow_run().sync()
    for note in (pipeline.store / ".mlflow").glob("*.json"):
        note.unlink()
    pipeline.mlflow_run().sync()
    (run,) = runs(pipeline.store)
    assert steps(pipeline.store, run.info.run_id, "train/loss") == list(range(1, 31))
    assert len(steps(pipeline.store, run.info.run_id, "final/val_loss")) == 1


def write_steps(path: Path, first: int, last: int, offset: float = 0.0) -> None:
    writer = MetricsWriter(path)
    for step in range(first, last + 1):
        writer.write(step, **{"train/loss": 10.0 - step + offset, "train/step_ms": time.time()})
    writer.close()


def losses(store: Path, run_id: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(store).get_metric_history(run_id, "train/loss"))


def losses_of_file(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(path) if "train/loss" in line]


@pytest.mark.parametrize("sees_the_cut", [True, False])
def test_a_resumed_training_is_not_doubled(pipeline: Pipeline, sees_the_cut: bool) -> None:
    """Training cuts its file back to the checkpoint and writes those steps again, with other times. The file may be
    longer than before at the next sync."""
    write_steps(pipeline.metrics, 1, 7)
    writer = MetricsWriter(pipeline.metrics)
    writer.write(7, **{"val/loss": 3.0})
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    time.sleep(0.01)
    cut_after_step(pipeline.metrics, 4)
    if sees_the_cut:
        mlflow_run.sync()
    write_steps(pipeline.metrics, 5, 7)
    MetricsWriter(pipeline.metrics).write(7, **{"val/loss": 3.0})
    write_steps(pipeline.metrics, 8, 12)
    mlflow_run.sync()
    assert mlflow_run.run_id and len(runs(pipeline.store)) == 1
    assert steps(pipeline.store, mlflow_run.run_id, "train/loss") == list(range(1, 13))
    assert steps(pipeline.store, mlflow_run.run_id, "train/step_ms") == list(range(1, 13))
    assert steps(pipeline.store, mlflow_run.run_id, "val/loss") == [7]


def test_weights_trained_again_get_a_run_of_their_own(pipeline: Pipeline) -> None:
    """Bug: of a training done again under its address (another precision), MLflow kept the curve and the evaluation of
    the earlier weights."""
    pipeline.run()
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    first = mlflow_run.run_id
    weights = pipeline.store / pipeline.plan.train.address / "checkpoints" / "step_00000001" / "model.safetensors"
    weights.write_text("other weights")
    request = pipeline.plan.train
    directory = StageDir(pipeline.store / request.address)
    facts = directory.facts(TrainFacts)
    directory.finish([str(weights.relative_to(directory.path))], facts.model_copy(update={"val_loss": 1.5}))
    mlflow_run.sync()
    second = mlflow_run.run_id
    assert second != first
    assert client(pipeline.store).get_run(second).data.metrics["final/val_loss"] == 1.5
    assert "evaluate/val_loss" not in client(pipeline.store).get_run(second).data.metrics
    assert steps(pipeline.store, str(second), "train/loss") == list(range(1, 31))
    assert client(pipeline.store).get_run(first).data.metrics["final/val_loss"] == 2.0
    pipeline.run("evaluate", "report")
    other = pipeline.mlflow_run()
    other.sync()
    assert other.run_id == second
    assert client(pipeline.store).get_run(second).data.metrics["evaluate/val_loss"] == 2.0


def test_a_repeated_training_leaves_the_finished_run_as_it_is(pipeline: Pipeline) -> None:
    """Bug: the run that a registered model points to is renamed "abandoned at step 1" and ends as KILLED."""
    pipeline.run()
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    mlflow_run.set_status("FINISHED")
    first = mlflow_run.run_id
    assert first
    name = client(pipeline.store).get_run(first).info.run_name
    shutil.rmtree(pipeline.metrics.parent)
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    mlflow_run.set_status("RUNNING")  # as a session does before the first step
    write_steps(pipeline.metrics, 1, 3, offset=0.25)
    mlflow_run.sync()
    assert mlflow_run.run_id != first
    finished = client(pipeline.store).get_run(first)
    assert (finished.info.run_name, finished.info.status) == (name, "FINISHED")
    assert ABANDONED not in finished.data.tags
    repeated = client(pipeline.store).get_run(str(mlflow_run.run_id))
    assert repeated.data.tags[REPLACES].startswith(first)


@pytest.mark.parametrize("new_session", [True, False])
def test_after_a_rollback_no_run_has_two_histories(pipeline: Pipeline, new_session: bool) -> None:
    """Bug: one curve has steps 5 to 7 of the discarded history and 8 to 12 of the new one."""
    write_steps(pipeline.metrics, 1, 7)
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    mlflow_run.set_status("RUNNING")
    old = mlflow_run.run_id
    assert old
    cut_after_step(pipeline.metrics, 4)
    write_steps(pipeline.metrics, 5, 12, offset=0.25)
    if new_session:
        mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    new = mlflow_run.run_id
    assert new and new != old
    assert losses(pipeline.store, new) == losses_of_file(pipeline.metrics)
    assert losses(pipeline.store, old) == [(step, 10.0 - step) for step in range(1, 8)]

    abandoned, current = client(pipeline.store).get_run(old), client(pipeline.store).get_run(new)
    assert abandoned.data.tags[ABANDONED].startswith("steps 5 to 7")
    assert "steps 5 to 7" in abandoned.data.tags["mlflow.note.content"]
    assert abandoned.info.run_name.endswith("abandoned at step 5") and abandoned.info.status == "KILLED"
    assert current.data.tags[REPLACES] == f"{old} from step 5 on"
    assert current.data.tags[IDENTITY] == abandoned.data.tags[IDENTITY]
    assert current.data.params == abandoned.data.params and ABANDONED not in current.data.tags

    for _ in range(2):  # a later session continues the new run
        pipeline.mlflow_run().sync()
    assert len(runs(pipeline.store)) == 2 and losses(pipeline.store, new) == losses_of_file(pipeline.metrics)


def test_two_stores_on_one_server_have_two_runs(
    store: Path, tmp_path: Path, fake_stages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: two machines with other rounding mark each other's run as abandoned, and create a run at each start."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    one, other = Pipeline(store), Pipeline(tmp_path / "other")
    write_steps(one.metrics, 1, 5)
    one.mlflow_run().sync()
    other.mlflow_run().sync()  # before its first step
    write_steps(other.metrics, 1, 9, offset=1e-5)
    for _ in range(2):
        for pipeline in (one, other):
            mlflow_run = pipeline.mlflow_run()
            mlflow_run.sync()
            assert mlflow_run.run_id and losses(store, mlflow_run.run_id) == losses_of_file(pipeline.metrics)
    assert len(runs(store)) == 2 and not any(ABANDONED in run.data.tags for run in runs(store))


@pytest.mark.parametrize("same_session", [True, False])
def test_a_batch_whose_response_is_lost_is_not_stored_twice(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, same_session: bool
) -> None:
    """MLflow stores the batch, the response is lost, and training resumes from a checkpoint and writes the same steps
    again, with other times."""
    write_steps(pipeline.metrics, 1, 7)
    mlflow_run = pipeline.mlflow_run()
    real = MlflowClient.log_batch

    def lose_the_response(self: MlflowClient, run_id: str, metrics: Any = (), **rest: Any) -> None:
        real(self, run_id, metrics=metrics, **rest)
        if metrics:
            raise ConnectionError("the response is lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lose_the_response)
        with pytest.raises(ConnectionError):
            mlflow_run.sync()
    time.sleep(0.01)
    cut_after_step(pipeline.metrics, 4)
    write_steps(pipeline.metrics, 5, 9)
    if not same_session:
        mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    assert mlflow_run.run_id and len(runs(pipeline.store)) == 1
    for key in ("train/loss", "train/step_ms"):
        assert steps(pipeline.store, mlflow_run.run_id, key) == list(range(1, 10))


def test_other_experiments_are_other_runs_and_compare_step_by_step(
    store: Path, fake_stages: Callable[..., None]
) -> None:
    """Bug: a run looked up by name is continued by another learning rate."""
    one, other = Pipeline(store), Pipeline(store, train__optim__max_lr=0.001)
    for pipeline in (one, other):
        pipeline.run()
        pipeline.mlflow_run().sync()
    run_ids = {run.data.params["train.optim.max_lr"]: run.info.run_id for run in runs(store)}
    assert set(run_ids) == {"0.003", "0.001"}
    losses = {
        lr: {m.step: m.value for m in client(store).get_metric_history(run_id, "train/loss")}
        for lr, run_id in run_ids.items()
    }
    assert losses["0.003"].keys() == losses["0.001"].keys()
    assert all(losses["0.003"][step] < losses["0.001"][step] for step in losses["0.003"])


def test_another_report_of_the_same_weights_is_the_same_run(store: Path, fake_stages: Callable[..., None]) -> None:
    """Bug: MLflow refuses to change a parameter, and a new title ends the sync."""
    Pipeline(store).run()
    Pipeline(store).mlflow_run().sync()
    other = Pipeline(store, report__title="Another title")
    other.run()
    other.mlflow_run().sync()
    (run,) = runs(store)
    assert run.data.tags["gpt2.address.report"] == other.plan.report.address
    report = store / "mlartifacts" / experiment_name() / run.info.run_id / "artifacts" / "report" / "report.md"
    assert "Another title" in report.read_text()


def test_values_that_mlflow_rejects_do_not_end_the_sync(pipeline: Pipeline) -> None:
    """Bug: NaN, infinity or text ends the sync."""
    writer = MetricsWriter(pipeline.metrics)
    writer.write(1, **{"train/loss": float("nan")})
    writer.write(2, **{"train/loss": float("inf"), "train/note": "text"})
    writer.write(3, **{"train/loss": 3.0})
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    assert mlflow_run.run_id and steps(pipeline.store, mlflow_run.run_id, "train/loss") == [1, 2, 3]


def test_flatten() -> None:
    tree = {"a": {"b": 1e-8, "c": [1, 2], "d": {}, "e": None, "f": True}, "g": "text"}
    assert flatten(tree) == {"a.b": "1e-08", "a.c": "[1, 2]", "a.d": "{}", "a.e": "null", "a.f": "true", "g": "text"}


# ---------------------------------------------------------------------------------------------------------- tracking


def test_the_status_follows_the_exception(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError), Tracking(pipeline.mlflow_run(), busy=True):
        raise ValueError
    assert runs(pipeline.store)[0].info.status == "FAILED"
    with pytest.raises(KeyboardInterrupt), Tracking(pipeline.mlflow_run(), busy=True):
        raise KeyboardInterrupt
    assert runs(pipeline.store)[0].info.status == "KILLED"
    with Tracking(pipeline.mlflow_run(), busy=True) as tracking:
        wait_for(lambda: runs(pipeline.store)[0].info.status == "RUNNING")
        pipeline.run()
    assert tracking.mlflow_run.run_id == runs(pipeline.store)[0].info.run_id
    assert runs(pipeline.store)[0].info.status == "FINISHED"
    assert len(steps(pipeline.store, runs(pipeline.store)[0].info.run_id, "train/loss")) == 30
    with Tracking(pipeline.mlflow_run(), busy=False):
        pass
    assert len(runs(pipeline.store)) == 1 and runs(pipeline.store)[0].info.status == "FINISHED"


def test_system_metrics_continue_after_a_restart(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    key = "system/cpu_utilization_percentage"

    def points() -> list[int]:
        return [step for run in runs(pipeline.store) for step in steps(pipeline.store, run.info.run_id, key)]

    for count in (2, 4):  # the second continues the steps of the first
        with Tracking(pipeline.mlflow_run(), busy=True):
            wait_for(lambda count=count: len(points()) >= count)  # type: ignore[misc]
    (run,) = runs(pipeline.store)
    assert 0 <= run.data.metrics[key] <= 100
    sampled = points()
    assert len(sampled) >= 4 and sampled == list(range(len(sampled)))


def test_an_unreachable_server_does_not_delay_the_stages(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: one call blocks for four minutes, then raises in the flow."""
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with Tracking(pipeline.mlflow_run(), busy=True):
        began = time.monotonic()
        pipeline.run()
        work = time.monotonic() - began
        ended = time.monotonic()
    assert time.monotonic() - ended < 30, f"closing took {time.monotonic() - ended:.0f} s after {work:.0f} s of work"
    last = caplog.messages[-1]
    assert uri in last and "Connection refused" in last


def test_credentials_of_the_tracking_server_are_not_shown(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: user:password of MLFLOW_TRACKING_URI in the log, in the last lines and in a stored link."""
    uri = f"http://ann:secret@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(logging.getLogger("prefect"), "propagate", True)
    mlflow_run = pipeline.mlflow_run()
    with Tracking(mlflow_run, busy=False):
        pass
    assert "http://127.0.0.1:" in caplog.text and "secret" not in caplog.text
    mlflow_run.run_id, mlflow_run.experiment_id = "0f", "1"
    assert mlflow_run.page is not None and mlflow_run.page.startswith("http://127.0.0.1:")
    shown = run_summary(pipeline.store, "report/0f", mlflow_run.fragment, "a1")
    assert "http://127.0.0.1:" in shown and "secret" not in shown


def test_a_corrupt_database_is_named_and_a_new_one_is_filled(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: the message names a remedy that fails."""
    pipeline.run()
    file = pipeline.store / "mlflow.db"
    file.write_bytes(b"x" * 20_000)
    with Tracking(pipeline.mlflow_run(), busy=False):
        pass
    last = caplog.messages[-1]
    assert f"{file} is corrupt" in last and "file is not a database" in last and "\n" not in last
    caplog.clear()
    file.rename(file.with_suffix(".old"))
    SqlAlchemyStore._engine_map.clear()  # as in a new process: the open engine reads the moved file
    with Tracking(pipeline.mlflow_run(), busy=False):
        pass
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    (run,) = runs(pipeline.store)
    assert losses(pipeline.store, run.info.run_id) == losses_of_file(pipeline.metrics)


def test_the_error_text_of_the_server_is_shown(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a refusal reads like a server that is down."""

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"error_code": "PERMISSION_DENIED", "message": "user 17 may not read"}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Tracking(pipeline.mlflow_run(), busy=False):
                pass
        finally:
            server.shutdown()
            thread.join()
    assert "user 17 may not read" in caplog.messages[-1]


def test_a_damaged_line_of_metrics_is_skipped(pipeline: Pipeline) -> None:
    """Bug: one changed byte ends the sync of all later steps."""
    write_steps(pipeline.metrics, 1, 3)
    pipeline.metrics.write_bytes(pipeline.metrics.read_bytes().replace(b'"step": 2', b'"step" 2'))
    mlflow_run = pipeline.mlflow_run()
    mlflow_run.sync()
    assert mlflow_run.run_id and steps(pipeline.store, mlflow_run.run_id, "train/loss") == [1, 3]


def test_a_server_that_starts_late_gets_every_point(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each point once, also those from before."""
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("tasks.tracking.MAX_RETRY_SECONDS", 2.0)
    server = None
    try:
        with Tracking(pipeline.mlflow_run(), busy=True) as tracking:
            pipeline.run("download", "tokenize", "benchmark-continuation")
            writer = MetricsWriter(pipeline.metrics)
            for step in range(1, 6):
                writer.write(step, **{"train/loss": 10.0 - step})
            wait_for(lambda: tracking._error is not None)
            assert tracking.mlflow_run.run_id is None
            server = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{pipeline.store}/mlflow.db",
                 "--artifacts-destination", str(tmp_path / "artifacts")],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            wait_for(lambda: tracking.mlflow_run.run_id is not None)
            for step in range(6, 11):
                writer.write(step, **{"train/loss": 10.0 - step})
        (run,) = runs(pipeline.store)
        assert steps(pipeline.store, run.info.run_id, "train/loss") == list(range(1, 11))
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
