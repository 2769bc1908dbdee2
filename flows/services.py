"""Prefect server, MLflow and a worker in the background.

    python -m flows.services up [--store DIR] [--prefect-port 4200] [--mlflow-port 5000] [--no-auth]
    python -m flows.services down | status
    python -m flows.services worker      in the foreground, for a server elsewhere (PREFECT_API_URL)

<store>/services holds each service's process ID, URL and log, and the login of both servers. Only its owner can read
it: a client that can start a deployment runs code as the worker's user.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from flows.databases import database_lock, mlflow_database, prefect_database, prepare_database
from flows.environment import set_variables, variable
from flows.prefect_server import DATABASE, database_url, use_prefect_server
from flows.server_process import HOST, PORTS, START_SECONDS, answers, error_line, start_server, wait_until_up
from flows.service_records import (
    client_environment,
    record_path,
    running_process,
    running_urls,
    server_environment,
)
from gpt2.atomic import write_text
from gpt2.config.recipe import names
from gpt2.config.runtime import Runtime
from gpt2.console import command
from gpt2.errors import UserError, without_credentials

STOP_SECONDS = 60.0
"""between SIGTERM and SIGKILL; the worker's training writes a checkpoint"""


# --------------------------------------------------------------------------------------------------------------- up


def up(store: Path, ports: dict[str, int], *, auth: bool = True) -> None:
    """Start the services that are not running, wait until they answer, and deploy every recipe.

    Args:
        auth: require the login. Without it, other users of the machine and web pages in a browser can run code through
            Prefect's port.

    Raises:
        UserError: a port is in use, or a service does not start.
    """
    for service, port in ports.items():
        if running_process(store, service) is None:
            _check_port(service, port)
    folder = store / "services"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    login = server_environment(store) if auth else {}
    with database_lock(store):
        urls = running_urls(store)
        prefect = urls.get("prefect") or f"http://{HOST}:{ports['prefect']}/api"
        mlflow = urls.get("mlflow") or f"http://{HOST}:{ports['mlflow']}"
        if "prefect" not in urls:
            prepare_database(prefect_database(store))
            module = ["prefect", "server", "start", "--host", HOST, "--port", str(ports["prefect"])]
            # PREFECT_API_URL: for its page, which asks port 4200 by default
            _start(
                store, "prefect", module, prefect, {DATABASE: database_url(store), "PREFECT_API_URL": prefect} | login
            )
        if "mlflow" not in urls:
            prepare_database(mlflow_database(store))
            _start(store, "mlflow", mlflow_module(store, ports["mlflow"], auth=auth), mlflow, login)
        _wait(store, "prefect", f"{prefect}/health")
        _wait(store, "mlflow", f"{mlflow}/health")
    if running_process(store, "worker") is None:
        from flows.deploy import deploy_all

        clients = client_environment(store)
        deploy_all(prefect, store, clients.get("PREFECT_API_AUTH_STRING"))
        _start(store, "worker", worker_module(), "", clients)
    exports = "".join(f"export {name}={value}\n" for name, value in client_environment(store).items())
    write_text(folder / "env", exports)
    print(f"Prefect  {prefect.removesuffix('/api')}")
    print(f"MLflow   {mlflow}")
    if client_environment(store).get("PREFECT_API_AUTH_STRING"):
        print(f"login    {folder / 'login'} holds user:password; enter the whole line in Prefect's page")
    print(f"logs     {folder}")
    print(f"start a recipe:  source {folder / 'env'}; .venv/bin/prefect deployment run reproduce-gpt2/demo")
    print(f"recipes: {', '.join(names())}; stop it all: make down")


def mlflow_module(store: Path, port: int, *, auth: bool = False) -> list[str]:
    """Arguments after `python -m` of an MLflow server with one worker process; its default is a dozen, with 2.6 GB."""
    from tasks.mlflow_runs import client, ensure_experiment

    uri = f"sqlite:///{mlflow_database(store)}"
    ensure_experiment(client(uri), store, uri)  # with its artifacts in the store
    return [
        *("mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", uri, "--artifacts-destination", str(store / "mlartifacts")),
        *(("--app-name", "basic-auth") if auth else ()),
    ]


def worker_module() -> list[str]:
    """Arguments after `python -m` of a worker that runs one flow at a time."""
    from flows.deploy import POOL

    return ["prefect", "worker", "start", "--pool", POOL, "--limit", "1"]


def _check_port(service: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} for {service} is in use{_owner(port)}: stop it, or choose another port with "
                f"make up ARGS='--{service}-port {port + 1}'"
            ) from error


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:  # other users' processes need root
        pass
    return ""


def _start(store: Path, service: str, module: list[str], url: str, variables: dict[str, str]) -> None:
    path = record_path(store, service)
    defaults = {"GPT2_STORE": str(store), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # A shell's background job ignores SIGINT, and its children inherit that; Prefect's worker stops itself by SIGINT.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(path.with_suffix(".log"), "ab") as log:
        process = start_server(module, defaults | variables, log, background=True)
    created = psutil.Process(process.pid).create_time()
    auth = "PREFECT_API_AUTH_STRING" in variables
    write_text(path, json.dumps({"pid": process.pid, "created": created, "url": url, "auth": auth}))


def _wait(store: Path, service: str, url: str) -> None:
    if not wait_until_up(service, url, lambda: running_process(store, service) is not None):
        log = record_path(store, service).with_suffix(".log")
        reason = error_line(log.read_text(errors="replace"))
        raise UserError(f"{service} did not start at {url}: {reason}; log {log}")


def connect(store: Path) -> None:
    """Connect this process to the store's servers, else to an embedded Prefect server and a database for MLflow."""
    clients = client_environment(store)
    mlflow, configured = clients.get("MLFLOW_TRACKING_URI"), variable("MLFLOW_TRACKING_URI")
    if mlflow and configured in (None, mlflow):
        set_variables({name: value for name, value in clients.items() if name.startswith("MLFLOW_")})
    elif configured is None:
        with suppress(OSError), database_lock(store):  # tasks.tracking reports a read-only store
            prepare_database(mlflow_database(store))
    use_prefect_server(store, clients.get("PREFECT_API_URL"), clients.get("PREFECT_API_AUTH_STRING"))


# ----------------------------------------------------------------------------------------------------- down, worker


def down(store: Path) -> list[str]:
    """Stop the running services, the worker first; their names."""
    stopped = []
    for service in ("worker", "mlflow", "prefect"):
        running = running_process(store, service)
        if running is None:
            continue
        _stop(running[0])
        record_path(store, service).unlink(missing_ok=True)
        stopped.append(service)
        if service == "worker" and (api := running_urls(store).get("prefect")):
            from flows.deploy import crash_orphaned_runs

            auth = client_environment(store).get("PREFECT_API_AUTH_STRING")
            crash_orphaned_runs(api, "make down; run it again to continue", auth)
    return stopped


def _stop(process: psutil.Process) -> None:
    """Send SIGTERM to the service, wait for it and its descendants, then SIGKILL the rest."""
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, STOP_SECONDS)
    for remaining in alive:
        remaining.kill()


def worker(store: Path) -> None:
    """Deploy every recipe on the server at PREFECT_API_URL and become a worker of it (exec).

    Raises:
        UserError: PREFECT_API_URL is not set, or does not answer within START_SECONDS.
    """
    from flows.deploy import deploy_all

    api = variable("PREFECT_API_URL")
    if not api:
        raise UserError("PREFECT_API_URL is not set: a worker needs a server; make up starts both")
    until = time.monotonic() + START_SECONDS
    while not answers(f"{api}/health"):
        if time.monotonic() > until:
            raise UserError(f"no Prefect server answers at {api}: is it running, and PREFECT_API_URL right?")
        time.sleep(1)
    deploy_all(api, store, variable("PREFECT_API_AUTH_STRING"))
    os.execv(sys.executable, [sys.executable, "-m", *worker_module()])


# ------------------------------------------------------------------------------------------------------------ summary


def run_summary(store: Path, report: str, mlflow: str | None, flow_run: str) -> str:
    """The last lines of a run: the report's path, and the run's addresses on MLflow's and Prefect's pages.

    Args:
        report: address of the report stage.
        mlflow: fragment of the run's address on an MLflow page.
    """
    urls = running_urls(store)
    prefect = (variable("PREFECT_API_URL") or urls.get("prefect") or "").rstrip("/").removesuffix("/api")
    tracking = variable("MLFLOW_TRACKING_URI") or urls.get("mlflow") or ""
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
    parser.add_argument("action", choices=("up", "down", "status", "worker"))
    parser.add_argument("--store", type=Path, default=variable("GPT2_STORE") or Runtime().store)
    for service, port in PORTS.items():
        parser.add_argument(f"--{service}-port", type=int, default=port)
    parser.add_argument("--no-auth", action="store_true", help="up: both servers accept every user of this machine")
    options = parser.parse_args(arguments)
    store = Runtime(store=options.store).store
    if options.action == "up":
        up(store, {service: getattr(options, f"{service}_port") for service in PORTS}, auth=not options.no_auth)
    elif options.action == "down":
        print(f"stopped: {', '.join(down(store)) or 'nothing was running'}")
    elif options.action == "worker":
        worker(store)
    else:
        for service in (*PORTS, "worker"):
            running = running_process(store, service)
            print(f"{service:8}", f"process {running[0].pid} {running[1]['url']}" if running else "not running")
    return 0


if __name__ == "__main__":
    command(main)
