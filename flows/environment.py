"""What Prefect and MLflow are told through the environment, and the server that a run without one gets. Import it
before either of them.

The user's own settings stand. Nothing is reported to anybody, and without a server Prefect keeps its state in the
store.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.launch import TETHER

for _name, _value in {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # lets the server notice a flow whose machine is gone
}.items():
    os.environ.setdefault(_name, _value)

HOST = "127.0.0.1"
PORTS = {"prefect": 4200, "mlflow": 5000}
"""where `make up` serves the two pages"""
START_SECONDS = 180.0
_until_exit = ExitStack()


def database_url(store: Path) -> str:
    """Prefect's database in the store: of the embedded server, and of the one that `make up` starts."""
    folder = store / ".prefect"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite+aiosqlite:///{folder / 'prefect.db'}"


def settle_prefect(store: Path, api_url: str | None = None) -> None:
    """Use the server that PREFECT_API_URL or the active profile names, else the one at `api_url`, else start one with
    its state in the store. For the rest of this process: what Prefect has to say about a run, it says until the end."""
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    if PREFECT_API_URL.value():
        return
    atexit.register(_until_exit.close)  # hooks run in reverse: after those that Prefect registers from here on
    if api_url:
        _until_exit.enter_context(temporary_settings(updates={PREFECT_API_URL: api_url}))
        return
    url = _until_exit.enter_context(_server(store))
    page = f"http://{HOST}:{PORTS['prefect']}"  # of the one that `make up` starts on the same database
    _until_exit.enter_context(temporary_settings({PREFECT_API_URL: url}, set_defaults={PREFECT_UI_URL: page}))


@contextmanager
def _server(store: Path) -> Iterator[str]:
    """Prefect's own application under uvicorn, as Prefect starts it for a run without a server; but tied to this
    process, so that kill -9 leaves no server behind."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    application = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    options = ["--host", HOST, "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    server = subprocess.Popen(
        [sys.executable, "-I", "-S", TETHER, str(os.getpid()), *application, *options],
        env={
            "PREFECT_API_DATABASE_CONNECTION_URL": database_url(store),
            **os.environ,
            "PREFECT__SERVER_EPHEMERAL": "1",  # neither a page nor schedules
            "PREFECT__SERVER_FINAL": "1",
        },
        process_group=0,  # Ctrl-C ends the flow, which then still has something to tell the server
        stdin=subprocess.DEVNULL,
    )
    url = f"http://{HOST}:{port}/api"
    try:
        until = time.monotonic() + START_SECONDS
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"Prefect's server did not come up at {url} (status {server.poll()})")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    """Whether there is an answer with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
