"""Deployments, the services of `make up`, and the container stack."""

import importlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from paths import ROOT
from waiting import free_port, gone, wait_for, written

from flows import services
from flows.environment import answers
from gpt2.config import recipe
from gpt2.errors import UserError


def test_every_recipe_has_a_deployment() -> None:
    """A recipe that prefect.yaml forgets cannot be started from the page."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert sorted(entry["name"] for entry in deployments) == sorted([*recipe.names(), "baseline"])
    for entry in deployments:
        assert entry["parameters"]["recipe"] == ("124m" if entry["name"] == "baseline" else entry["name"])
        assert entry["work_pool"] == {"name": "gpu"}
        module, function = entry["entrypoint"].split(":")
        assert callable(getattr(importlib.import_module(module.removesuffix(".py").replace("/", ".")), function))


def test_a_port_in_use_is_one_message_with_the_way_out(tmp_path: Path) -> None:
    """By default the server's log says so, and whoever called it waits."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["up", "--store", str(tmp_path), "--prefect-port", str(free_port()), "--mlflow-port", str(port)]
        done = subprocess.run([sys.executable, "-m", "flows.services", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: port {port}, wanted for mlflow, is in use by process {os.getpid()} \(\S+\): stop that, or take "
        rf"another with make up ARGS='--mlflow-port {port + 1}'\n",
        done.stderr,
    )
    assert services.running(tmp_path) == {}


def test_another_process_with_the_old_number_is_not_ours(tmp_path: Path) -> None:
    """`make down` after a reboot must not stop whatever got the number since."""
    note = tmp_path / "services" / "prefect.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"pid": os.getpid(), "created": 1.0, "url": "http://127.0.0.1:1/api"}))
    assert services.running(tmp_path) == {}
    assert services.down(tmp_path) == []
    note.write_text(json.dumps({"pid": os.getpid(), "created": psutil.Process().create_time(), "url": "here"}))
    assert services.running(tmp_path) == {"prefect": "here"}


def test_the_login_goes_to_our_own_servers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a tracking server elsewhere is sent the password of the one on this store."""
    (tmp_path / "services").mkdir()
    ours = {"prefect": "http://127.0.0.1:1/api", "mlflow": "http://127.0.0.1:2"}
    for service, url in ours.items():
        note = {"pid": os.getpid(), "created": psutil.Process().create_time(), "url": url, "auth": True}
        (tmp_path / "services" / f"{service}.json").write_text(json.dumps(note))
    settled: list[Any] = []
    monkeypatch.setattr(services, "settle_prefect", lambda *given: settled.append(given))
    monkeypatch.setattr(os, "environ", {"MLFLOW_TRACKING_URI": "http://elsewhere"})
    services.connect(tmp_path)
    assert os.environ == {"MLFLOW_TRACKING_URI": "http://elsewhere"}
    monkeypatch.setattr(os, "environ", {})
    services.connect(tmp_path)
    login = (tmp_path / "services" / "login").read_text()
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    assert os.environ["MLFLOW_TRACKING_URI"] == ours["mlflow"]
    assert ":".join(os.environ[name] for name in names) == login
    assert settled == [(tmp_path, ours["prefect"], login)] * 2


def test_a_worker_needs_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(UserError, match="PREFECT_API_URL is not set: a worker needs a server; make up starts both"):
        services.worker(tmp_path)


def test_compose_starts_commands_that_exist() -> None:
    """The stack cannot be run where there is no Docker: at least its parts name each other rightly."""
    stack = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert set(stack["services"]) == {"database", "prefect", "mlflow", "worker"}
    for service in stack["services"].values():
        assert set(service.get("depends_on", {})) <= set(stack["services"])
        for mount in service.get("volumes", []):
            assert mount.partition(":")[0] in stack["volumes"]
    worker = stack["services"]["worker"]
    assert worker["command"] == ["python", "-m", "flows.services", "worker"]
    assert worker["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"
    context = ROOT / "docker" / stack["services"]["worker"]["build"]["context"]
    copied = re.findall(r"^COPY (.*) \S+$", (context / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in names:
        assert (ROOT / name).exists() and f"!{name}" in ignored


# ----------------------------------------------------------------------------------------------------------- for real


class Up:
    """The services on ports of their own, with stages that take no time."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.env = dict(os.environ)
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            self.env.pop(name, None)
        ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
        started = self.services("up", *ports)
        assert started.returncode == 0, started.stderr
        self.urls = services.running(store)
        self.env |= services.client_environment(store)

    def services(self, *words: str) -> Any:
        command = [sys.executable, "-m", "flows.services", *words, "--store", str(self.store)]
        return subprocess.run(command, capture_output=True, text=True, env=self.env)

    def prefect(self, *words: str) -> Any:
        return subprocess.run(
            [sys.executable, "-m", "prefect", *words], capture_output=True, text=True, env=self.env, timeout=300
        )


@pytest.fixture
def up(store: Path, fake_stages: Callable[..., None]) -> Iterator[Up]:
    try:
        yield Up(store)
    finally:
        services.down(store)


@pytest.mark.slow
def test_up_deploy_run_cancel_down(up: Up) -> None:
    """The documented path, and a cancellation from the page: training must end in order, not live on as an orphan."""
    assert up.services("up").returncode == 0  # once more changes nothing
    assert services.running(up.store) == up.urls

    # Whoever may post here runs code as us: no other user of the machine, and no page in a browser.
    for url in (f"{up.urls['prefect']}/flows/filter", f"{up.urls['mlflow']}/api/2.0/mlflow/experiments/search"):
        assert httpx.post(url, json={"max_results": 1} if "mlflow" in url else {}).status_code == 401
    folder = up.store / "services"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert up.env["PREFECT_API_AUTH_STRING"] in (folder / "env").read_text()

    overrides = '{"train.max_steps": 12, "train.optim.warmup_steps": 2}'
    done = up.prefect("deployment", "run", "reproduce-gpt2/demo", "-p", f"overrides={overrides}", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = up.store.glob("report/*/manifest.json")
    assert json.loads((report.parent / "request.json").read_text())["config"]["name"] == "demo"

    wrong = up.prefect("deployment", "run", "reproduce-gpt2/demo", "-p", 'overrides={"train.max_stepz": 1}', "--watch")
    assert wrong.returncode == 1

    # A training that waits, started and cancelled as from the page. The worker's environment is not ours any more.
    for pid in [note["pid"] for note in [json.loads((up.store / "services" / "worker.json").read_text())]]:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: services._process(up.store, "worker") is None)
    up.env["FAKE_STAGES"] = '{"train": "wait"}'
    assert up.services("up").returncode == 0
    started = up.prefect("deployment", "run", "reproduce-gpt2/demo", "-p", 'overrides={"train.seed": 7}')
    flow_run = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", started.stdout)
    assert flow_run, started.stdout + started.stderr
    wait_for(lambda: any(written(path) for path in up.store.glob("train/*/waiting")))
    (waiting,) = up.store.glob("train/*/waiting")
    assert up.prefect("flow-run", "cancel", flow_run.group()).returncode == 0
    wait_for(lambda: written(waiting.parent / "saved"))
    pid = int(waiting.read_text())
    wait_for(lambda: gone(pid))
    wait_for(lambda: "CANCELLED" in up.prefect("flow-run", "inspect", flow_run.group()).stdout.upper())

    # A flow from the command line finds the login; MLflow has its run only if it does.
    words = ["demo", f"runtime.store={up.store}", "train.max_steps=12", "train.optim.warmup_steps=2"]
    plain = {name: value for name, value in up.env.items() if name not in services.client_environment(up.store)}
    flow = subprocess.run(
        [sys.executable, "-m", "flows.reproduce", *words], env=plain, capture_output=True, text=True, timeout=300
    )
    assert flow.returncode == 0 and "WARNING" not in flow.stderr, flow.stderr
    assert flow.stderr.count("Cached") == 6 and f"{up.urls['mlflow']}/#/experiments/" in flow.stdout

    down = up.services("down")
    assert down.stdout == "stopped: worker, mlflow, prefect\n"
    assert services.running(up.store) == {}
    assert not answers(f"{up.urls['prefect']}/health")
    assert up.services("status").stdout.count("not running") == 3
