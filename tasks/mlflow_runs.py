"""MLflow's client, the experiment, and runs looked up by an identity tag."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.environment import experiment_name, set_mlflow_defaults

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

IDENTITY = "gpt2.identity"
"""tag: recipe and address of the stage that a run belongs to"""


def import_mlflow() -> None:
    """Import MLflow (two seconds) with short time-outs and without its log messages."""
    set_mlflow_defaults()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # logs a traceback and raises it too
    import mlflow  # noqa: F401


def client(uri: str) -> MlflowClient:
    """An MLflow client for a tracking URI."""
    import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def ensure_experiment(mlflow: MlflowClient, store: Path, uri: str) -> str:
    """The experiment's ID, created if missing. Artifacts of a local database are kept in the store."""
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    if experiment := mlflow.get_experiment_by_name(name):
        return str(experiment.experiment_id)
    location = None if uri.startswith("http") else (store / "mlartifacts" / name).as_uri()
    try:
        return str(mlflow.create_experiment(name, artifact_location=location))
    except MlflowException:
        if experiment := mlflow.get_experiment_by_name(name):  # another process created it meanwhile
            return str(experiment.experiment_id)
        raise


def find_or_create(
    mlflow: MlflowClient,
    store: Path,
    uri: str,
    identity: str,
    name: str,
    tags: Mapping[str, str],
    accept: Callable[[Run], bool] = lambda run: True,
) -> Run:
    """The newest accepted run with `identity`; without one, a new run with `name` and `tags`.

    Args:
        store: holds the lock that keeps two processes from creating two runs.
        accept: filters the runs with that identity.
    """
    with locked(store / ".mlflow" / "lock"):
        experiment = ensure_experiment(mlflow, store, uri)
        runs = mlflow.search_runs(
            [experiment], f"tags.`{IDENTITY}` = '{identity}'", order_by=["attributes.start_time DESC"]
        )
        for run in runs:
            if accept(run):
                return run
        # The identity is set at creation: after a crash the next call must find the run.
        return mlflow.create_run(experiment, run_name=name, tags={IDENTITY: identity, **tags})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
