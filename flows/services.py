"""Prefect server, MLflow and a worker in the background: `python -m flows.services up|down|status`."""

from __future__ import annotations

from pathlib import Path


def running(store: Path) -> dict[str, str]:
    return {}


def use(up: dict[str, str]) -> None: ...


def where(store: Path, report: str, mlflow: str | None, flow_run: str) -> str:
    return f"report   {store / report / 'report.html'}"
