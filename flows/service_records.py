"""Records of the services on a store, in <store>/services: process, URL, and the login that both servers require."""

from __future__ import annotations

import importlib.util
import json
import secrets
from pathlib import Path
from typing import Any

import psutil

from flows.server_process import PORTS
from gpt2.atomic import write_text
from gpt2.errors import UserError

USER = "gpt2"


def record_path(store: Path, service: str) -> Path:
    return store / "services" / f"{service}.json"


def running_process(store: Path, service: str) -> tuple[psutil.Process, dict[str, Any]] | None:
    """The process of a running service and its record: pid, created, url, auth.

    The creation time tells it from a later process with the same PID.
    """
    try:
        record = json.loads(record_path(store, service).read_text())
        process = psutil.Process(record["pid"])
        alive = process.create_time() == record["created"] and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, ValueError, KeyError, psutil.Error):
        return None
    return (process, record) if alive else None


def running_urls(store: Path) -> dict[str, str]:
    """URLs of the servers that `up` started on this store: prefect (its API) and mlflow."""
    processes = {service: running_process(store, service) for service in PORTS}
    return {service: process[1]["url"] for service, process in processes.items() if process}


def _login(store: Path) -> str:
    """user:password of the servers on this store, created on first use."""
    path = store / "services" / "login"
    if not path.exists():
        write_text(path, f"{USER}:{secrets.token_urlsafe(24)}")
    return path.read_text()


def client_environment(store: Path) -> dict[str, str]:
    """Variables for Prefect's and MLflow's clients of the servers that `up` started on this store."""
    environment = {}
    if prefect := running_process(store, "prefect"):
        environment["PREFECT_API_URL"] = prefect[1]["url"]
        if prefect[1].get("auth"):
            environment["PREFECT_API_AUTH_STRING"] = _login(store)
    if mlflow := running_process(store, "mlflow"):
        environment["MLFLOW_TRACKING_URI"] = mlflow[1]["url"]
        if mlflow[1].get("auth"):
            user, _, password = _login(store).partition(":")
            environment |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    return environment


def server_environment(store: Path) -> dict[str, str]:
    """Variables with which both servers require the login."""
    if importlib.util.find_spec("flask_wtf") is None:
        raise UserError("MLflow's authentication needs Flask-WTF: make install, or make up ARGS=--no-auth")
    user, _, password = _login(store).partition(":")
    config = store / "services" / "mlflow-auth.ini"
    lines = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{config.with_name('mlflow-users.db')}",
        "admin_username": user,
        "auth_cache_ttl_seconds": "60",  # hashing a password is slower than most requests
    }
    write_text(config, "[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items()))
    return {
        "PREFECT_SERVER_API_AUTH_STRING": f"{user}:{password}",
        "PREFECT_API_AUTH_STRING": f"{user}:{password}",  # the server's background services are clients
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": password,
    }
