"""Start a server process and wait until it answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from gpt2.errors import UserError
from tasks.environment import child_environment
from tasks.launch import exit_with_parent

HOST = "127.0.0.1"
PORTS = {"prefect": 4200, "mlflow": 5000}
"""of the two pages that `make up` serves"""
START_SECONDS = 900.0
"""limit for a server on a loaded machine; an exited server is noticed at once"""
NOTE_SECONDS = 60.0


def start_server(
    module: Sequence[str],
    variables: Mapping[str, str],
    output: IO[bytes] | int,
    *,
    background: bool,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.Popen[str]:
    """Start `python -m module...` with stdout and stderr in `output`.

    Args:
        variables: added to the environment.
        background: outlive this process; otherwise the kernel sends SIGTERM when the calling thread ends.
        pass_fds: descriptors that the server inherits.
    """
    words = [sys.executable, "-m", *module]
    return subprocess.Popen(
        words if background else exit_with_parent(words, os.getpid()),
        env=child_environment(overrides=variables),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=background,
        process_group=None if background else 0,  # Ctrl-C reaches the flow only, which still sends its final state
        pass_fds=pass_fds,
    )


def wait_until_up(name: str, url: str, is_alive: Callable[[], bool]) -> bool:
    """Wait until `url` answers; False if the process exits first.

    Raises:
        UserError: no answer within START_SECONDS.
    """
    start = time.monotonic()
    next_note = NOTE_SECONDS
    while not answers(url):
        if not is_alive():
            return False
        waited = time.monotonic() - start
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        if waited > START_SECONDS:
            raise UserError(f"{name} has not answered at {url} for {waited:.0f} s ({load}): retry at a lower load")
        if waited > next_note:
            print_note(f"{name} has been starting for {waited:.0f} s ({load})")
            next_note += NOTE_SECONDS
        time.sleep(0.1)
    return True


def answers(url: str) -> bool:
    """Whether a GET returns status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310  an http address of this project
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def error_line(log: str) -> str:
    """The last line of a server's log that names an exception, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (exceptions or lines or ["no output"])[-1][:300]


def print_note(text: str) -> None:
    """Print one line to stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)
