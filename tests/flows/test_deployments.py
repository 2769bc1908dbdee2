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

from flows import service_records, services
from flows.server_process import answers
from gpt2.config import recipe
from gpt2.errors import UserError


def test_every_recipe_has_a_deployment() -> None:
    """Bug: prefect.yaml lacks a recipe."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert sorted(entry["name"] for entry in deployments) == sorted([*recipe.names(), "baseline"])
    for entry in deployments:
        assert entry["parameters"]["recipe"] == ("124m" if entry["name"] == "baseline" else entry["name"])
        assert entry["work_pool"] == {"name": "gpu"}
        module, function = entry["entrypoint"].split(":")
        assert callable(getattr(importlib.import_module(module.removesuffix(".py").replace("/", ".")), function))


def test_a_port_in_use_is_one_line_with_the_process_and_another_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["up", "--store", str(tmp_path), "--prefect-port", str(free_port()), "--mlflow-port", str(port)]
        done = subprocess.run([sys.executable, "-m", "flows.services", *words], capture_output=True, text=True)
    assert done.returncode == 2
    pattern = rf"error: port {port} .*process {os.getpid()} \(\S+\).*ARGS='--mlflow-port {port + 1}'\n"
    assert re.fullmatch(pattern, done.stderr)
    assert service_records.running_urls(tmp_path) == {}


def test_another_process_with_the_recorded_pid_is_not_a_service(tmp_path: Path) -> None:
    """Bug: `make down` after a reboot stops another process."""
    note = tmp_path / "services" / "prefect.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"pid": os.getpid(), "created": 1.0, "url": "http://127.0.0.1:1/api"}))
    assert service_records.running_urls(tmp_path) == {}
    assert services.down(tmp_path) == []
    note.write_text(json.dumps({"pid": os.getpid(), "created": psutil.Process().create_time(), "url": "here"}))
    assert service_records.running_urls(tmp_path) == {"prefect": "here"}


def test_the_login_is_sent_to_the_servers_of_the_store_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: another tracking server receives the password."""
    (tmp_path / "services").mkdir()
    ours = {"prefect": "http://127.0.0.1:1/api", "mlflow": "http://127.0.0.1:2"}
    for service, url in ours.items():
        note = {"pid": os.getpid(), "created": psutil.Process().create_time(), "url": url, "auth": True}
        (tmp_path / "services" / f"{service}.json").write_text(json.dumps(note))
    calls: list[Any] = []
    monkeypatch.setattr(services, "use_prefect_server", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(os, "environ", {"MLFLOW_TRACKING_URI": "http://elsewhere"})
    services.connect(tmp_path)
    assert os.environ == {"MLFLOW_TRACKING_URI": "http://elsewhere"}
    monkeypatch.setattr(os, "environ", {})
    services.connect(tmp_path)
    login = (tmp_path / "services" / "login").read_text()
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    assert os.environ["MLFLOW_TRACKING_URI"] == ours["mlflow"]
    assert ":".join(os.environ[name] for name in names) == login
    assert calls == [(tmp_path, ours["prefect"], login)] * 2


def test_a_worker_needs_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(UserError, match="PREFECT_API_URL"):
        services.worker(tmp_path)


def test_compose_starts_commands_that_exist() -> None:
    """Without Docker: services, volumes, commands and copied paths exist."""
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


# ------------------------------------------------------------------------------------------------- real services


class Up:
    """The services on free ports, with fake stages."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.env = dict(os.environ)
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            self.env.pop(name, None)
        ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
        started = self.services("up", *ports)
        assert started.returncode == 0, started.stderr
        self.urls = service_records.running_urls(store)
        self.env |= service_records.client_environment(store)

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
    """The documented path, and a cancellation from the page, after which training saves and exits."""
    assert up.services("up").returncode == 0  # idempotent
    assert service_records.running_urls(up.store) == up.urls

    # A client of Prefect runs code as this user: other users and web pages need the login.
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

    # A waiting training, cancelled as from the page. The worker is restarted with another FAKE_STAGES.
    for pid in [note["pid"] for note in [json.loads((up.store / "services" / "worker.json").read_text())]]:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: service_records.running_process(up.store, "worker") is None)
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

    # A flow from the command line reads the login, without which MLflow refuses its run.
    words = ["demo", f"runtime.store={up.store}", "train.max_steps=12", "train.optim.warmup_steps=2"]
    plain = {name: value for name, value in up.env.items() if name not in service_records.client_environment(up.store)}
    flow = subprocess.run(
        [sys.executable, "-m", "flows.reproduce", *words], env=plain, capture_output=True, text=True, timeout=300
    )
    assert flow.returncode == 0 and "WARNING" not in flow.stderr, flow.stderr
    assert flow.stderr.count("Cached") == 6 and f"{up.urls['mlflow']}/#/experiments/" in flow.stdout

    down = up.services("down")
    assert down.stdout == "stopped: worker, mlflow, prefect\n"
    assert service_records.running_urls(up.store) == {}
    assert not answers(f"{up.urls['prefect']}/health")
    assert up.services("status").stdout.count("not running") == 3
