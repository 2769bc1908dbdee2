"""Finding MLflow, an experiment in it, and the run of something by its identity: one run each, however often asked."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "reproduce-gpt2"
IDENTITY = "gpt2.identity"
"""tag: what a run is of"""


def tracking_uri(store: Path) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store}/mlflow.db"


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def preload() -> None:
    """Import MLflow, set up to give up soon (by default one call to a dead server takes four minutes) and quietly."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # else it tells of each migration of a new database
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs a traceback of what it then raises
    import mlflow  # noqa: F401  two seconds, which only whoever tracks spends


def client(uri: str) -> MlflowClient:
    """An MLflow client."""
    preload()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def ensure_experiment(mlflow: MlflowClient, store: Path, uri: str) -> str:
    """The experiment's id. Artifacts of a local database lie in the store, wherever the command was started."""
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    if found := mlflow.get_experiment_by_name(name):
        return str(found.experiment_id)
    place = None if uri.startswith("http") else (store / "mlartifacts" / name).as_uri()
    try:
        return str(mlflow.create_experiment(name, artifact_location=place))
    except MlflowException:
        if found := mlflow.get_experiment_by_name(name):  # somebody else was faster
            return str(found.experiment_id)
        raise


def find_or_create(
    mlflow: MlflowClient,
    store: Path,
    uri: str,
    identity: str,
    name: str,
    tags: Mapping[str, str],
    fits: Callable[[Run], bool] = lambda run: True,
) -> Run:
    """The newest run with that identity that `fits`; made under `name` with `tags` if there is none.

    Args:
        store: two processes that work on one store never make two runs.
    """
    with locked(store / ".mlflow" / "lock"):
        experiment = ensure_experiment(mlflow, store, uri)
        found = mlflow.search_runs(
            [experiment], f"tags.`{IDENTITY}` = '{identity}'", order_by=["attributes.start_time DESC"]
        )
        for run in found:
            if fits(run):
                return run
        # with its identity from the first moment, or a later call would not find it
        return mlflow.create_run(experiment, run_name=name, tags={IDENTITY: identity, **tags})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; one process at a time does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
