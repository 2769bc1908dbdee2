"""An embedded Prefect server: it ends with the flow's process and is restarted if it exits early.

The flow's process owns the listening socket and passes it to the server. The address is therefore the same after a
restart, and requests during the restart wait in the socket's queue instead of being refused.
"""

from __future__ import annotations

import atexit
import secrets
import signal
import socket
import subprocess
import threading
from collections import deque
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType

from flows.databases import database_lock, prefect_database, prepare_database
from flows.environment import variable
from flows.server_process import HOST, PORTS, error_line, print_note, start_server, wait_until_up
from gpt2.errors import UserError

RESTART_SECONDS = 5.0
"""pause between attempts to restart the server"""
DATABASE = "PREFECT_API_DATABASE_CONNECTION_URL"
IN_MEMORY = "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true&check_same_thread=false"
_until_exit = ExitStack()


def use_prefect_server(store: Path, api_url: str | None = None, auth: str | None = None) -> None:
    """Use, until this process exits, the server of PREFECT_API_URL or of the active profile, else the one at `api_url`,
    else an embedded server with its database in the store.

    Args:
        auth: user:password of the server at `api_url`, if it requires them.
    """
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    if PREFECT_API_URL.value() not in (None, api_url):
        return
    atexit.register(_until_exit.close)  # hooks run in reverse order: after those that Prefect registers later
    page = None
    if api_url is None:
        server = _until_exit.enter_context(EmbeddedServer(store))
        api_url, auth = server.url, server.auth
        page = f"http://{HOST}:{PORTS['prefect']}"  # `make up` serves the same database there
    settings = {PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: auth}
    _until_exit.enter_context(temporary_settings(settings, set_defaults={PREFECT_UI_URL: page} if page else None))


def database_url(store: Path) -> str:
    return f"sqlite+aiosqlite:///{prefect_database(store)}"


class ServerFailed(Exception):
    """The server exited before it answered; the text is the error line of its log."""


class EmbeddedServer:
    """`with EmbeddedServer(store) as server:` runs Prefect's application under uvicorn at `server.url`.

    The state is kept in memory if the store's database is unusable: no space, read-only, or another Prefect version.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.auth = f"gpt2:{secrets.token_urlsafe(24)}"
        """user:password; other users of the machine can reach the port"""
        self.url = ""
        self._socket = socket.socket()
        self._database = variable(DATABASE)
        self._process: subprocess.Popen[str] | None = None
        self._last_lines: deque[str] = deque(maxlen=200)
        self._closing = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="prefect-server", daemon=True)

    def __enter__(self) -> EmbeddedServer:
        self._socket.bind((HOST, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        self._socket.listen(1024)
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}/api"
        try:
            self._start_initial()
        except BaseException:
            self._stop()
            raise
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    # -------------------------------------------------------------------------------------------------------- starting

    def _start_initial(self) -> None:
        if self._database is None:
            try:
                with database_lock(self.store):
                    prepare_database(prefect_database(self.store))
                    self._start(database_url(self.store))
                self._database = database_url(self.store)
                return
            except (OSError, ServerFailed) as error:
                path = prefect_database(self.store)
                print_note(f"{path} is not usable ({error}): Prefect's history will not include this run")
            self._database = IN_MEMORY
        try:
            self._start(self._database)
        except ServerFailed as error:
            raise UserError(f"Prefect's server does not start: {error}") from error

    def _start(self, database: str) -> None:
        """Start a server and wait until it answers."""
        module = ["uvicorn", "--factory", "prefect.server.api.server:create_app"]
        options = ["--fd", str(self._socket.fileno()), "--log-level", "error", "--lifespan", "on"]
        variables = {
            DATABASE: database,
            "PREFECT_SERVER_API_AUTH_STRING": self.auth,
            "PREFECT__SERVER_EPHEMERAL": "1",  # no page, no schedules
            "PREFECT__SERVER_FINAL": "1",
        }
        process = start_server(
            [*module, *options], variables, subprocess.PIPE, background=False, pass_fds=(self._socket.fileno(),)
        )
        self._process = process
        self._last_lines.clear()
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        if not wait_until_up("Prefect's server", f"{self.url}/health", lambda: process.poll() is None):
            process.kill()
            process.wait()
            reader.join(5)
            raise ServerFailed(error_line("".join(self._last_lines)))

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            self._last_lines.extend(line for line in lines if line.strip())

    # ----------------------------------------------------------------------------------------------------- supervising

    def _supervise(self) -> None:
        """Restart the server while the run lasts. PR_SET_PDEATHSIG follows this thread, so it outlives the servers."""
        assert self._process is not None and self._database is not None
        while True:
            status = self._process.wait()
            if self._closing.is_set():
                return
            reason = signal.Signals(-status).name if status < 0 else f"status {status}"
            print_note(f"Prefect's server exited early ({reason}); restarting it")
            while not self._closing.is_set():
                try:
                    with database_lock(self.store) if self._database == database_url(self.store) else nullcontext():
                        self._start(self._database)
                    break
                except (OSError, ServerFailed, UserError) as error:
                    print_note(f"Prefect's server does not start ({error}); retrying in {RESTART_SECONDS:.0f} s")
                    self._closing.wait(RESTART_SECONDS)

    def _stop(self) -> None:
        self._closing.set()
        self._socket.close()
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
