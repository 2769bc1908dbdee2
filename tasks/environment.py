"""Environment variables of the tasks: how child processes inherit them, and where MLflow is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # by default one call to a dead server takes four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # else it logs each migration of a new database
}


def set_mlflow_defaults() -> None:
    """Set the variables that MLflow reads when it is imported; values that the user has set stay."""
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)


def child_environment(*, defaults: Mapping[str, str] | None = None, overrides: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child: `defaults` for unset variables, then `overrides`."""
    return {**(defaults or {}), **os.environ, **overrides}


def tracking_uri(store: Path) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store}/mlflow.db"


def experiment_name() -> str:
    """MLFLOW_EXPERIMENT_NAME, or "reproduce-gpt2"."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "reproduce-gpt2"
