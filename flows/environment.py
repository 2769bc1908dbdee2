"""What Prefect and MLflow are told through the environment. Import it before either of them.

The user's own settings stand. Nothing is reported to anybody, and without a server Prefect keeps its state in the
store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

for _name, _value in {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # 20 by default; migrating a new database takes longer
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # lets the server notice a flow whose machine is gone
}.items():
    os.environ.setdefault(_name, _value)


def database_url(store: Path) -> str:
    """Prefect's database in the store: of the embedded server, and of the one that `make up` starts."""
    folder = store / ".prefect"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite+aiosqlite:///{folder / 'prefect.db'}"


@contextmanager
def prefect_in(store: Path, api_url: str | None = None) -> Iterator[None]:
    """Use the server that PREFECT_API_URL or the active profile names, else `api_url`, else an embedded one."""
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
    elif api_url:
        with temporary_settings(updates={PREFECT_API_URL: api_url}):
            yield
    else:
        with temporary_settings(set_defaults={PREFECT_API_DATABASE_CONNECTION_URL: database_url(store)}):
            yield
