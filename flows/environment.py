"""Environment variables of the flows. Import this module before Prefect and MLflow, which read theirs when imported.

Variables that the user has set stay. Usage reporting is off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

for _name, _value in {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; flows.deploy marks silent flow runs as crashed
}.items():
    os.environ.setdefault(_name, _value)


def variable(name: str) -> str | None:
    """Value of an environment variable; None if it is unset or empty."""
    return os.environ.get(name) or None


def set_variables(values: Mapping[str, str]) -> None:
    """Set variables for this process and its children."""
    os.environ.update(values)
