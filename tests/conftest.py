"""Fixtures for tests that run stages through Prefect and MLflow."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flows.environment  # noqa: F401  before Prefect and MLflow are imported

# A shell's background job ignores SIGINT, and its children inherit that; tests send SIGINT to children.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
FAKE_PATH = f"{TESTS / 'fake_site'}:{TESTS}:{TESTS.parent}"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One Prefect server per session: it starts in 16 seconds."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def empty_mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database without runs, to be copied: a migration takes seconds."""
    from tasks.mlflow_runs import client

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_mlflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store with a migrated MLflow database, and no MLflow variables in the environment."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "GPT2_STORE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "store"
    path.mkdir()
    shutil.copy(empty_mlflow_db, path / "mlflow.db")
    return path


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace every stage by fake_stages.py, here and in child processes; call it to set their actions."""
    from gpt2.stage.table import STAGES
    from tasks import registry

    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, stage.model_copy(update={"module": "fake_stages"}))
    monkeypatch.setenv("PYTHONPATH", FAKE_PATH)
    monkeypatch.setattr(registry, "register", lambda *arguments, **options: "1")  # fake stages leave no model

    def act(**actions: str) -> None:
        monkeypatch.setenv("FAKE_STAGES", json.dumps(actions))

    act()
    return act
