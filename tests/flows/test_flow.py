"""The flow: shared stages, continuation after a failure, signals."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_API_URL
from waiting import wait_for, written

from flows.reproduce import Outcome, reproduce
from gpt2.config.recipe import load
from gpt2.errors import UserError
from gpt2.plan import plan
from gpt2.stage.manifest import Request, read_model
from tasks.environment import experiment_name
from tasks.launch import StageFailed

pytestmark = pytest.mark.slow  # a Prefect server and whole flows

TOY = {"train.max_steps": 12, "train.optim.warmup_steps": 2}


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "corpus.txt"
    path.write_text("some text\n")
    return {"download.source": {"kind": "local", "paths": [str(path)]}}


@pytest.fixture
def toy(store: Path, fake_stages: Callable[..., None], prefect_server: None) -> Callable[..., Outcome]:
    def run(recipe: str = "demo", **overrides: Any) -> Outcome:
        return reproduce(recipe, {**TOY, **overrides}, store=str(store))

    return run


def states(outcome: Outcome) -> dict[str, str]:
    """State of each task run of a flow run, by stage."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[outcome.flow_run])))  # type: ignore[list-item]
    return {run.name.split()[0]: run.state_name or "" for run in runs}


def mlflow_runs(store: Path) -> list[Any]:
    mlflow = MlflowClient(f"sqlite:///{store}/mlflow.db")
    experiment = mlflow.get_experiment_by_name(experiment_name())
    return list(mlflow.search_runs([experiment.experiment_id])) if experiment else []


def steps(store: Path, run_id: str, key: str = "train/loss") -> list[int]:
    return sorted(m.step for m in MlflowClient(f"sqlite:///{store}/mlflow.db").get_metric_history(run_id, key))


# ------------------------------------------------------------------------------------------------------ in this process


def test_a_second_run_is_cached_and_adds_nothing(toy: Callable[..., Outcome], store: Path) -> None:
    first = toy()
    (run,) = mlflow_runs(store)
    second = toy()
    assert set(states(first).values()) == {"Completed"} and len(states(first)) == 6
    assert set(states(second).values()) == {"Cached"} and len(states(second)) == 6
    assert first.report == second.report
    (repeated,) = mlflow_runs(store)
    assert repeated.info.run_id == run.info.run_id and repeated.info.status == "FINISHED"
    assert steps(store, run.info.run_id) == list(range(1, 13))
    assert repeated.data.tags["prefect.flow_run_id"] == second.flow_run


def test_names_of_flow_and_task_runs(toy: Callable[..., Outcome], store: Path) -> None:
    outcome = toy()
    steps_ = plan(load("demo", TOY), store)
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(outcome.flow_run)  # type: ignore[arg-type]
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
    assert flow_run.name == f"demo {steps_.train.address}"
    short = {f"{name.replace('-', ' ')} {r.address.partition('/')[2][:8]}" for name, r in steps_.requests().items()}
    assert {task.name for task in tasks} == short
    report: Any = Artifact.get("report-demo")
    assert "A small GPT-2" in report.data and str(store) in report.data and "![" not in report.data


def test_sizes_share_the_data_and_compare_step_by_step(
    toy: Callable[..., Outcome], store: Path, corpus: dict[str, Any]
) -> None:
    """Two experiments run their common stages once, and have the same steps in MLflow."""
    small = states(toy("124m", **corpus))
    large = states(toy("350m", **corpus))
    assert small["tokenize"] == "Completed"
    assert {stage: large[stage] for stage in ("download", "tokenize", "benchmark", "train")} == {
        "download": "Cached", "tokenize": "Cached", "benchmark": "Cached", "train": "Completed",
    }  # fmt: skip
    runs = {run.data.tags["gpt2.recipe"]: run for run in mlflow_runs(store)}
    assert set(runs) == {"124m", "350m"}
    assert steps(store, runs["124m"].info.run_id) == steps(store, runs["350m"].info.run_id) == list(range(1, 13))
    differ = {key for key, value in runs["124m"].data.params.items() if runs["350m"].data.params.get(key) != value}
    assert {"train.model.n_layer", "train.optim.max_lr"} <= differ and "tokenize.shard_tokens" not in differ


def test_a_failed_stage_keeps_the_stages_before_it(
    toy: Callable[..., Outcome], store: Path, fake_stages: Callable[..., None]
) -> None:
    """Bug: a transaction around the stages rolls tokenization back when training fails."""
    fake_stages(evaluate="user error")
    with pytest.raises(StageFailed, match=r"^evaluate \w+: shard 7 holds 3 tokens"):
        toy()
    assert mlflow_runs(store)[0].info.status == "FAILED"
    fake_stages()
    after = states(toy())
    assert {stage for stage, state in after.items() if state == "Completed"} == {"evaluate", "report"}
    (run,) = mlflow_runs(store)
    assert run.info.status == "FINISHED"


def test_a_retried_training_has_each_step_once_in_mlflow(
    toy: Callable[..., Outcome], store: Path, fake_stages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails after step 6 with a checkpoint at 4: steps 5 and 6 are computed twice."""
    from tasks import stage

    monkeypatch.setattr(stage.train._task, "retry_delay_seconds", 3)  # step 6 is in MLflow by then
    fake_stages(train="stop at 6")
    outcome = toy()
    assert states(outcome)["train"] == "Completed"
    (run,) = mlflow_runs(store)
    assert steps(store, run.info.run_id) == list(range(1, 13))
    assert steps(store, run.info.run_id, "val/loss") == list(range(2, 13, 2))


def test_an_optional_benchmark_may_be_missing(
    toy: Callable[..., Outcome], store: Path, fake_stages: Callable[..., None]
) -> None:
    extra = {"benchmarks.other": {"kind": "continuation", "optional": True, "seed": 7}}
    wanted = {**extra, "train.benchmark": None, "evaluate.benchmarks": ["other"]}
    fake_stages(benchmark="user error")
    outcome = toy(**wanted)
    assert states(outcome) == {
        "download": "Completed", "tokenize": "Completed", "benchmark": "Failed", "train": "Completed",
        "evaluate": "Completed", "report": "Completed",
    }  # fmt: skip
    fake_stages()
    after = states(toy(**wanted))  # scored once it is available
    assert {s for s, state in after.items() if state == "Completed"} == {"benchmark", "evaluate", "report"}
    required = {**wanted, "benchmarks.other": {"kind": "continuation", "seed": 8}}
    fake_stages(benchmark="user error")
    with pytest.raises(StageFailed, match=r"^benchmark"):
        toy(**required)


def test_a_failed_harness_is_skipped_and_retried_by_the_next_run(
    toy: Callable[..., Outcome], store: Path, fake_stages: Callable[..., None]
) -> None:
    """Bugs: missing data of a task fails the report, or the report without it is final."""
    wanted = {"harness": {"tasks": ["arc_easy"]}}
    fake_stages(harness="user error")
    outcome = toy(**wanted)
    assert (states(outcome)["harness"], states(outcome)["report"]) == ("Failed", "Completed")
    request = read_model(store / outcome.report.address / "request.json", Request)
    assert "harness" not in request.inputs and "shard 7 holds 3 tokens" in request.hints["without_harness"]
    fake_stages()
    outcome = toy(**wanted)
    assert {s for s, state in states(outcome).items() if state == "Completed"} == {"harness", "report"}
    assert "harness" in read_model(store / outcome.report.address / "request.json", Request).inputs
    (run,) = mlflow_runs(store)
    assert run.data.metrics["harness/arc_easy/acc"] == 0.4


def test_a_misspelt_override_fails_before_anything_runs(toy: Callable[..., Outcome], store: Path) -> None:
    with pytest.raises(UserError, match=r"train\.optim\.max_lrr: no such field; did you mean 'max_lr'"):
        toy(**{"train.optim.max_lrr": 1})
    assert not list(store.glob("*/*/request.json"))


# ------------------------------------------------------------------------------------------------ from the command line


class CommandLine:
    """`python -m flows.reproduce demo ...` with fake stages."""

    def __init__(self, store: Path, env: dict[str, str]) -> None:
        self.store, self.env = store, env
        self.output = store.parent / "output.txt"

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "flows.reproduce", "demo", f"runtime.store={self.store}"]
        words += [*(f"{key}={value}" for key, value in TOY.items()), *overrides]
        with open(self.output, "wb") as file:
            return subprocess.Popen(words, stdout=file, stderr=file, env=self.env, start_new_session=True)

    def run(self, *overrides: str) -> tuple[int, str]:
        process = self.start(*overrides)
        status = process.wait(300)
        return status, self.output.read_text()


@pytest.fixture
def command_line(store: Path, fake_stages: Callable[..., None], prefect_server: None) -> Iterator[CommandLine]:
    yield CommandLine(store, {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or ""})


def training(store: Path) -> Path | None:
    """Directory of a waiting training."""
    return next((path.parent for path in store.glob("train/*/waiting") if written(path)), None)


def test_errors_are_one_line_and_a_status(command_line: CommandLine, fake_stages: Callable[..., None]) -> None:
    status, output = command_line.run("train.optim.max_lrr=1")
    assert status == 2
    assert output == "error: demo.yaml: train.optim.max_lrr: no such field; did you mean 'max_lr'?\n"
    command_line.env["FAKE_STAGES"] = '{"tokenize": "user error"}'
    status, output = command_line.run()
    assert status == 2
    assert output.splitlines()[-1].startswith("error: tokenize ") and output.endswith("delete it and run again\n")
    assert "Traceback" not in output


def test_the_last_lines_are_report_and_pages(command_line: CommandLine) -> None:
    status, output = command_line.run()
    assert status == 0
    report, mlflow, prefect = output.splitlines()[-3:]
    assert Path(report.split()[1]).name == "report.html" and Path(report.split()[1]).exists()
    assert mlflow.startswith("MLflow   make up, then http://127.0.0.1:5000/#/experiments/")
    assert prefect.startswith("Prefect  http://127.0.0.1:") and "/runs/flow-run/" in prefect


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_to_the_flow_lets_training_save(
    command_line: CommandLine, number: signal.Signals, expected: int
) -> None:
    """And the same command continues."""
    command_line.env["FAKE_STAGES"] = '{"train": "wait"}'
    flow = command_line.start()
    wait_for(lambda: training(command_line.store) is not None)
    directory = training(command_line.store)
    assert directory is not None
    flow.send_signal(number)
    assert flow.wait(60) == expected
    wait_for(lambda: written(directory / "saved"))
    assert written(directory / "saved") == "SIGTERM"
    if number != signal.SIGKILL:
        assert "run the same command again to continue" in command_line.output.read_text().splitlines()[-1]
    command_line.env["FAKE_STAGES"] = "{}"
    status, output = command_line.run()
    assert status == 0
    assert output.count("Cached") == 3
    assert [run.info.status for run in mlflow_runs(command_line.store)] == ["FINISHED"]


def test_without_a_server_the_database_is_in_the_store(command_line: CommandLine, tmp_path: Path) -> None:
    """Bug: Prefect's database in the home directory."""
    command_line.env.pop("PREFECT_API_URL")
    command_line.env["HOME"] = str(tmp_path)
    command_line.env.pop("PREFECT_HOME", None)
    command_line.env.pop("PREFECT_API_DATABASE_CONNECTION_URL", None)
    status, output = command_line.run()
    assert status == 0, output
    assert (command_line.store / ".prefect" / "prefect.db").stat().st_size > 100_000
    status, output = command_line.run()
    assert status == 0 and output.count("Cached") == 6
    assert output.splitlines()[-1].startswith("Prefect  make up, then http://127.0.0.1:4200/runs/flow-run/")
    assert not list((tmp_path / ".prefect").glob("*.db"))


def test_settings_precede_the_import_of_prefect() -> None:
    """Bug: Prefect reads its settings when it is imported, and then reports usage."""
    code = "import flows.reproduce; from prefect.settings import get_current_settings as s; "
    code += "print(s().server.analytics_enabled, s().flows.heartbeat_frequency)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DO_NOT"))}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert output.stdout.split() == ["False", "30"]
