"""Prefect server, MLflow and a worker in the background.

    python -m flows.services up [--store DIR] [--prefect-port 4200] [--mlflow-port 5000] [--no-auth]
    python -m flows.services down | status
    python -m flows.services worker      in the foreground, for a server elsewhere (PREFECT_API_URL)

What runs is noted in <store>/services, beside the logs. The folder is its owner's alone, as it also holds the user name
and password that both servers ask for: whoever may start a deployment runs code as the user of the worker.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from flows.databases import locked, make_ready, mlflow_database, prefect_database
from flows.environment import HOST, PORTS, START_SECONDS, answers, last_words, wait_until_up
from flows.prefect_server import DATABASE, database_url, settle_prefect
from gpt2.atomic import write_text
from gpt2.config.recipe import names
from gpt2.config.runtime import Runtime
from gpt2.console import command
from gpt2.errors import UserError, without_credentials

USER = "gpt2"
STOP_SECONDS = 60.0
"""the worker's share is the longest: a training under it writes a checkpoint first"""


# ----------------------------------------------------------------------------------------------------- what is running


def _note(store: Path, service: str) -> Path:
    return store / "services" / f"{service}.json"


def _process(store: Path, service: str) -> tuple[psutil.Process, dict[str, Any]] | None:
    """The running process of a service and its note; a number that the kernel has given to another process since is
    told apart by its time of birth."""
    try:
        note = json.loads(_note(store, service).read_text())
        process = psutil.Process(note["pid"])
        alive = process.create_time() == note["created"] and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, ValueError, KeyError, psutil.Error):
        return None
    return (process, note) if alive else None


def running(store: Path) -> dict[str, str]:
    """URLs of the services that `up` has started on this store: prefect (its API) and mlflow."""
    found = {service: _process(store, service) for service in PORTS}
    return {service: process[1]["url"] for service, process in found.items() if process}


# ------------------------------------------------------------------------------------------------------ authentication


def _login(store: Path) -> str:
    """user:password of the services on this store, made once."""
    path = store / "services" / "login"
    if not path.exists():
        write_text(path, f"{USER}:{secrets.token_urlsafe(24)}")
    return path.read_text()


def client_environment(store: Path) -> dict[str, str]:
    """The variables with which Prefect's and MLflow's clients reach what `up` has started on this store."""
    environment = {}
    if found := _process(store, "prefect"):
        environment["PREFECT_API_URL"] = found[1]["url"]
        if found[1].get("auth"):
            environment["PREFECT_API_AUTH_STRING"] = _login(store)
    if found := _process(store, "mlflow"):
        environment["MLFLOW_TRACKING_URI"] = found[1]["url"]
        if found[1].get("auth"):
            user, _, password = _login(store).partition(":")
            environment |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    return environment


def _server_environment(store: Path) -> dict[str, str]:
    """The variables with which both servers ask for the login."""
    if importlib.util.find_spec("flask_wtf") is None:
        raise UserError("MLflow's authentication needs Flask-WTF: make install, or make up ARGS=--no-auth")
    user, _, password = _login(store).partition(":")
    config = store / "services" / "mlflow-auth.ini"
    lines = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{config.with_name('mlflow-users.db')}",
        "admin_username": user,
        "auth_cache_ttl_seconds": "60",  # hashing a password takes longer than most requests
    }
    write_text(config, "[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items()))
    return {
        "PREFECT_SERVER_API_AUTH_STRING": f"{user}:{password}",
        "PREFECT_API_AUTH_STRING": f"{user}:{password}",  # the server's own services are clients of it
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": password,
    }


# --------------------------------------------------------------------------------------------------------------- up


def up(store: Path, ports: dict[str, int], *, auth: bool = True) -> None:
    """Start what is not running yet, wait until it answers, and deploy every recipe.

    Args:
        auth: whether both servers ask for the login; on a machine that others use, whoever can post to Prefect's port
            runs code through the worker, and so does a web page in the browser.

    Raises:
        UserError: a port is in use, or a service did not come up.
    """
    for service, port in ports.items():
        if _process(store, service) is None:
            _check_port(service, port)
    folder = store / "services"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    asks = _server_environment(store) if auth else {}
    with locked(store):
        prefect, mlflow = running(store).get("prefect"), running(store).get("mlflow")
        if prefect is None:
            make_ready(prefect_database(store))
            prefect = f"http://{HOST}:{ports['prefect']}/api"
            words = ["prefect", "server", "start", "--host", HOST, "--port", str(ports["prefect"])]
            given = {DATABASE: database_url(store), "PREFECT_API_URL": prefect, **asks}  # the URL: its page asks there
            _start(store, "prefect", [sys.executable, "-m", *words], prefect, given)
        if mlflow is None:
            make_ready(mlflow_database(store))
            mlflow = f"http://{HOST}:{ports['mlflow']}"
            _start(store, "mlflow", mlflow_command(store, ports["mlflow"], auth=auth), mlflow, asks)
        _wait(store, "prefect", f"{prefect}/health")
        _wait(store, "mlflow", f"{mlflow}/health")
    if _process(store, "worker") is None:
        from flows.deploy import announce

        clients = client_environment(store)
        announce(prefect, store, clients.get("PREFECT_API_AUTH_STRING"))
        _start(store, "worker", worker_command(), "", clients)
    exports = "".join(f"export {name}={value}\n" for name, value in client_environment(store).items())
    write_text(folder / "env", exports)
    print(f"Prefect  {prefect.removesuffix('/api')}")
    print(f"MLflow   {mlflow}")
    if client_environment(store).get("PREFECT_API_AUTH_STRING"):
        print(f"login    {folder / 'login'} holds user:password; Prefect's page wants them as they stand there")
    print(f"logs     {folder}")
    print(f"start a recipe:  source {folder / 'env'}; .venv/bin/prefect deployment run reproduce-gpt2/demo")
    print(f"recipes: {', '.join(names())}; stop it all: make down")


def mlflow_command(store: Path, port: int, *, auth: bool = False) -> list[str]:
    """One process is enough for one person's page; by default it is a dozen, with 2.6 GB."""
    from tasks.mlflow_runs import client, ensure_experiment

    uri = f"sqlite:///{store}/mlflow.db"
    ensure_experiment(client(uri), store, uri)  # so that its artifacts lie in the store for whoever writes them
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", uri, "--artifacts-destination", str(store / "mlartifacts")),
        *(("--app-name", "basic-auth") if auth else ()),
    ]


def worker_command() -> list[str]:
    from flows.deploy import POOL

    # One flow run at a time: a GPU is never shared.
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--limit", "1"]


def _check_port(service: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port}, wanted for {service}, is in use{_owner(port)}: stop that, or take another with "
                f"make up ARGS='--{service}-port {port + 1}'"
            ) from error


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:  # other users' processes are not shown to everybody
        pass
    return ""


def _start(store: Path, service: str, words: list[str], url: str, env: dict[str, str] | None = None) -> None:
    note = _note(store, service)
    given = {
        **os.environ,
        "GPT2_STORE": str(store),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **(env or {}),
    }
    # A shell's background job ignores SIGINT, and so would its children; Prefect's worker ends itself by that signal.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(note.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            words, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    created = psutil.Process(process.pid).create_time()
    auth = "PREFECT_API_AUTH_STRING" in (env or {})
    write_text(note, json.dumps({"pid": process.pid, "created": created, "url": url, "auth": auth}))


def _wait(store: Path, service: str, url: str) -> None:
    if not wait_until_up(service, url, lambda: _process(store, service) is not None):
        log = _note(store, service).with_suffix(".log")
        raise UserError(f"{service} did not come up at {url}: {last_words(log.read_text(errors='replace'))}; log {log}")


def connect(store: Path) -> None:
    """Let this process use the services that `up` has started on this store, and a Prefect server and an MLflow
    database in the store where it has not."""
    up = client_environment(store)
    mlflow = up.get("MLFLOW_TRACKING_URI")
    if mlflow and os.environ.get("MLFLOW_TRACKING_URI", mlflow) == mlflow:
        os.environ.update({name: value for name, value in up.items() if name.startswith("MLFLOW_")})
    elif not os.environ.get("MLFLOW_TRACKING_URI"):
        with suppress(OSError), locked(store):  # a store that cannot be written to: tracking reports it
            make_ready(mlflow_database(store))
    settle_prefect(store, up.get("PREFECT_API_URL"), up.get("PREFECT_API_AUTH_STRING"))


# ----------------------------------------------------------------------------------------------------- down, worker


def down(store: Path) -> list[str]:
    """Stop what is running, the worker first; their names."""
    stopped = []
    for service in ("worker", "mlflow", "prefect"):
        found = _process(store, service)
        if found is None:
            continue
        _stop(found[0])
        _note(store, service).unlink(missing_ok=True)
        stopped.append(service)
        if service == "worker" and (api := running(store).get("prefect")):
            from flows.deploy import crash_running

            auth = client_environment(store).get("PREFECT_API_AUTH_STRING")
            crash_running(api, "make down; run it again to go on", auth)
    return stopped


def _stop(process: psutil.Process) -> None:
    """SIGTERM for the service, time for it and whatever it started, SIGKILL for what is left."""
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, STOP_SECONDS)
    for left in alive:
        left.kill()


def worker(store: Path) -> None:
    """Become a worker of the server at PREFECT_API_URL, once it answers, with every recipe deployed."""
    from flows.deploy import announce

    api = os.environ.get("PREFECT_API_URL")
    if not api:
        raise UserError("PREFECT_API_URL is not set: a worker needs a server; make up starts both")
    until = time.monotonic() + START_SECONDS
    while not answers(f"{api}/health"):
        if time.monotonic() > until:
            raise UserError(f"no Prefect server answers at {api}: is it running, and PREFECT_API_URL right?")
        time.sleep(1)
    announce(api, store, os.environ.get("PREFECT_API_AUTH_STRING"))
    command = worker_command()
    os.execv(command[0], command)


# ------------------------------------------------------------------------------------------------------ where to look


def where(store: Path, report: str, mlflow: str | None, flow_run: str) -> str:
    """The last lines of a run: the report, and the addresses of its two pages, or how to get them.

    Args:
        report: address of the report stage.
        mlflow: fragment of the run's address on an MLflow page.
    """
    up = running(store)
    prefect = (os.environ.get("PREFECT_API_URL") or up.get("prefect") or "").rstrip("/").removesuffix("/api")
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or up.get("mlflow") or ""
    if not tracking.startswith("http"):
        tracking = f"make up, then http://{HOST}:{PORTS['mlflow']}"
    if not prefect:
        prefect = f"make up, then http://{HOST}:{PORTS['prefect']}"
    prefect, tracking = without_credentials(prefect), without_credentials(tracking)
    return "\n".join((
        f"report   {store / report / 'report.html'}",
        f"MLflow   {tracking.rstrip('/')}/{mlflow or ''}",
        f"Prefect  {prefect}/runs/flow-run/{flow_run}",
    ))  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.services", description=__doc__)
    parser.add_argument("what", choices=("up", "down", "status", "worker"))
    parser.add_argument("--store", type=Path, default=os.environ.get("GPT2_STORE") or Runtime().store)
    for service, port in PORTS.items():
        parser.add_argument(f"--{service}-port", type=int, default=port)
    parser.add_argument("--no-auth", action="store_true", help="up: both servers trust every user of this machine")
    given = parser.parse_args(arguments)
    store = Runtime(store=given.store).store
    try:
        if given.what == "up":
            up(store, {service: getattr(given, f"{service}_port") for service in PORTS}, auth=not given.no_auth)
        elif given.what == "down":
            print(f"stopped: {', '.join(down(store)) or 'nothing was running'}")
        elif given.what == "worker":
            worker(store)
        else:
            for service in (*PORTS, "worker"):
                found = _process(store, service)
                print(f"{service:8}", f"process {found[0].pid} {found[1]['url']}" if found else "not running")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command(main)
