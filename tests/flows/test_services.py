"""The embedded Prefect server and the store's databases: concurrent starts, kill, corruption."""

import os
import signal
import sqlite3
import stat
import threading
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import pytest

from flows import prefect_server
from flows.databases import database_lock, find_corruption, mlflow_database, prefect_database, prepare_database
from flows.prefect_server import EmbeddedServer
from flows.server_process import answers, error_line

PAGE = 4096


def make_database(path: Path, rows: int = 2000) -> None:
    path.parent.mkdir(exist_ok=True)
    prepare_database(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY, name TEXT)")
        database.executemany("INSERT INTO runs (name) VALUES (?)", [(f"run {n:050}",) for n in range(rows)])
        database.commit()


def overwrite(path: Path, first_page: int, pages: int = 5) -> None:
    with open(path, "r+b") as file:
        file.seek(first_page * PAGE)
        file.write(b"\xa5" * PAGE * pages)


def run_count(server: EmbeddedServer) -> int:
    """Number of flow runs that the server knows."""
    answer = httpx.post(f"{server.url}/flow_runs/count", json={}, auth=("gpt2", server.auth.removeprefix("gpt2:")))
    return int(answer.raise_for_status().json())


# ------------------------------------------------------------------------------------------------------------ databases


@pytest.mark.parametrize("first_page", [0, 3])
def test_a_corrupt_database_is_renamed_and_replaced(
    tmp_path: Path, first_page: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mlflow.db"
    make_database(path)
    assert find_corruption(path) is None
    overwrite(path, first_page)
    damaged = path.read_bytes()
    prepare_database(path)
    (aside,) = tmp_path.glob("mlflow.db.damaged-*")
    assert aside.read_bytes() == damaged and path.read_bytes() == b""
    assert str(aside) in capsys.readouterr().err
    prepare_database(path)
    assert list(tmp_path.glob("mlflow.db.damaged-*")) == [aside]


def test_a_locked_database_is_not_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.databases.BUSY_SECONDS", 0.1)
    path = tmp_path / "mlflow.db"
    make_database(path)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        prepare_database(path)
    assert path.stat().st_size > PAGE and not list(tmp_path.glob("*.damaged-*"))


def test_databases_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    """Bug: under the usual umask every user of the machine can read them."""
    before = os.umask(0o022)
    try:
        with database_lock(tmp_path):
            for path in (prefect_database(tmp_path), mlflow_database(tmp_path)):
                make_database(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert stat.S_IMODE(prefect_database(tmp_path).parent.stat().st_mode) == 0o700


def test_the_error_line_of_a_log_is_its_last_exception() -> None:
    """Bug: the last line of SQLAlchemy's traceback is a link to its documentation."""
    log = 'Traceback (most recent call last):\n  File "a"\nsqlalchemy.exc.OperationalError: disk full\n(Background)\n'
    assert error_line(log) == "sqlalchemy.exc.OperationalError: disk full"
    assert error_line("one\ntwo\n") == "two" and error_line("") == "no output"


# --------------------------------------------------------------------------------------------------------------- server


@pytest.fixture(autouse=True)
def no_database_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(prefect_server.DATABASE, raising=False)


@pytest.mark.slow
def test_concurrent_servers_in_a_fresh_store_all_start(tmp_path: Path) -> None:
    """Bug: concurrent migrations corrupt the database, and all flows but one fail."""
    counts: list[int] = []
    answered = threading.Barrier(2)

    def serve() -> None:
        with EmbeddedServer(tmp_path) as server:
            counts.append(run_count(server))
            answered.wait(300)  # so that both serve the database at the same time

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [0, 0]
    assert prefect_database(tmp_path).stat().st_mode & 0o077 == 0


def server_child() -> psutil.Process:
    """The server among this process's children; multiprocessing's helpers of other tests may be there too."""
    (server,) = (child for child in psutil.Process().children() if "prefect" in " ".join(child.cmdline()))
    return server


@pytest.mark.slow
def test_a_killed_server_is_replaced_at_the_same_address(tmp_path: Path) -> None:
    """Bug: the flow hangs for minutes and ends in httpx.ConnectError."""
    with EmbeddedServer(tmp_path) as server:
        url = server.url
        answer = httpx.post(f"{url}/flows/", json={"name": "kept"}, auth=("gpt2", server.auth.removeprefix("gpt2:")))
        assert answer.status_code == 201
        assert httpx.get(f"{url}/flows/name/kept").status_code == 401  # other users of the machine
        killed = server_child()
        killed.send_signal(signal.SIGKILL)
        # The request waits in the socket's queue until the next server accepts it.
        retried = httpx.get(f"{url}/flows/name/kept", auth=("gpt2", server.auth.removeprefix("gpt2:")), timeout=300)
        assert retried.status_code == 200
        replacement = server_child()
        assert replacement.pid != killed.pid
    assert not replacement.is_running() and not answers(f"{url}/health")


@pytest.mark.slow
def test_a_run_without_a_usable_database_still_has_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a database of another Prefect version stops a run, even of finished stages."""
    path = prefect_database(tmp_path)
    make_database(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('0123456789ab')")
        database.commit()
    before = path.read_bytes()
    with EmbeddedServer(tmp_path) as server:
        assert run_count(server) == 0
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and str(path) in stderr and "0123456789ab" in stderr
    assert path.read_bytes()[PAGE:] == before[PAGE:]  # the first page holds the journal mode
