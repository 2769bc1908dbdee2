"""The Prefect server of a run that has none: tied to the run's process, and started again if it ends early.

The run's process owns the listening socket and hands it to the server. So the address stays the same when the server
is started again, and requests made meanwhile wait in the socket's queue instead of being refused.
"""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType

from flows.databases import locked, make_ready, prefect_database
from flows.environment import HOST, PORTS, last_words, note, wait_until_up
from gpt2.errors import UserError
from tasks.launch import TETHER

AGAIN_SECONDS = 5.0
"""between two attempts to start a server again"""
DATABASE = "PREFECT_API_DATABASE_CONNECTION_URL"
IN_MEMORY = "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true&check_same_thread=false"
_until_exit = ExitStack()


def settle_prefect(store: Path, api_url: str | None = None, auth: str | None = None) -> None:
    """Use the server that PREFECT_API_URL or the active profile names, else the one at `api_url`, else start one with
    its state in the store. For the rest of this process: what Prefect has to say about a run, it says until the end.

    Args:
        auth: user:password for the server at `api_url`, where it asks for them
    """
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    if PREFECT_API_URL.value() not in (None, api_url):
        return
    atexit.register(_until_exit.close)  # hooks run in reverse: after those that Prefect registers from here on
    page = None
    if api_url is None:
        server = _until_exit.enter_context(EmbeddedServer(store))
        api_url, auth = server.url, server.auth
        page = f"http://{HOST}:{PORTS['prefect']}"  # of the one that `make up` starts on the same database
    given = {PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: auth}
    _until_exit.enter_context(temporary_settings(given, set_defaults={PREFECT_UI_URL: page} if page else None))


def database_url(store: Path) -> str:
    return f"sqlite+aiosqlite:///{prefect_database(store)}"


class ServerFailed(Exception):
    """The server ended before it answered; the text is the last line that it printed."""


class EmbeddedServer:
    """`with EmbeddedServer(store) as server:` runs Prefect's own application under uvicorn at `server.url`.

    If the store's database cannot be used (no space, read-only, written by another version of Prefect), the state is
    kept in memory: a run does not depend on its history.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.auth = f"gpt2:{secrets.token_urlsafe(24)}"
        """other users of the machine can reach the port, and must not change the state of this run"""
        self.url = ""
        self._socket = socket.socket()
        self._database = os.environ.get(DATABASE)
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
            self._start_first()
        except BaseException:
            self._end()
            raise
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    # -------------------------------------------------------------------------------------------------------- starting

    def _start_first(self) -> None:
        if self._database is None:
            try:
                with locked(self.store):
                    make_ready(prefect_database(self.store))
                    self._start(database_url(self.store))
                self._database = database_url(self.store)
                return
            except (OSError, ServerFailed) as error:
                path = prefect_database(self.store)
                note(f"{path} cannot be used ({error}): this run is left out of Prefect's history")
            self._database = IN_MEMORY
        try:
            self._start(self._database)
        except ServerFailed as error:
            raise UserError(f"Prefect's server does not start: {error}") from error

    def _start(self, database: str) -> None:
        """Start a server and wait until it answers."""
        application = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        options = ["--fd", str(self._socket.fileno()), "--log-level", "error", "--lifespan", "on"]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", TETHER, str(os.getpid()), *application, *options],
            env={
                **os.environ,
                DATABASE: database,
                "PREFECT_SERVER_API_AUTH_STRING": self.auth,
                "PREFECT__SERVER_EPHEMERAL": "1",  # neither a page nor schedules
                "PREFECT__SERVER_FINAL": "1",
            },
            process_group=0,  # Ctrl-C ends the flow, which then still has something to tell the server
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(self._socket.fileno(),),
        )
        self._process = process
        self._last_lines.clear()
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        if not wait_until_up("Prefect's server", f"{self.url}/health", lambda: process.poll() is None):
            process.kill()
            process.wait()
            reader.join(5)
            raise ServerFailed(last_words("".join(self._last_lines)))

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            self._last_lines.extend(line for line in lines if line.strip())

    # ----------------------------------------------------------------------------------------------------- supervising

    def _supervise(self) -> None:
        """Start the server again for as long as the run lasts. This thread also is what the kernel ties those servers
        to, so it does not end before them."""
        assert self._process is not None and self._database is not None
        while True:
            status = self._process.wait()
            if self._closing.is_set():
                return
            reason = signal.Signals(-status).name if status < 0 else f"status {status}"
            note(f"Prefect's server ended early ({reason}); starting it again")
            while not self._closing.is_set():
                try:
                    with locked(self.store) if self._database == database_url(self.store) else nullcontext():
                        self._start(self._database)
                    break
                except (OSError, ServerFailed, UserError) as error:
                    note(f"Prefect's server does not start ({error}); trying again in {AGAIN_SECONDS:.0f} s")
                    self._closing.wait(AGAIN_SECONDS)

    def _end(self) -> None:
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
