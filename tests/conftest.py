"""Fixtures of the tests that run stages through Prefect and MLflow."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flows.environment  # noqa: F401  before Prefect and MLflow, whose settings it makes

# A shell's background job ignores SIGINT, and what the tests start would too: they interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
FAKE_PATH = f"{TESTS / 'fake_site'}:{TESTS}:{TESTS.parent}"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One Prefect server for all tests that need one; starting it takes longer than any of them."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def empty_mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database without runs: migrating one takes seconds, copying it none."""
    from tasks.mlflow_runs import client

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path: Path, empty_mlflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store whose MLflow database is ready, and no setting from outside."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "GPT2_STORE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "store"
    path.mkdir()
    shutil.copy(empty_mlflow_db, path / "mlflow.db")
    return path


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let every stage be started as fake_stages.py, here and in child processes; call it to say what they do."""
    from gpt2.stage.table import STAGES
    from tasks import registry

    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, stage.model_copy(update={"module": "fake_stages"}))
    monkeypatch.setenv("PYTHONPATH", FAKE_PATH)
    monkeypatch.setattr(registry, "register", lambda *arguments, **options: "1")  # there is no model

    def act(**actions: str) -> None:
        monkeypatch.setenv("FAKE_STAGES", json.dumps(actions))

    act()
    return act
