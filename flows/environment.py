"""The settings that Prefect and MLflow read from the environment, and how to wait for their servers. Import it before
either of them.

The user's own settings stand. Nothing is reported to anybody.
"""

from __future__ import annotations

import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from gpt2.errors import UserError

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
START_SECONDS = 900.0
"""a loaded machine may need minutes; a server that has ended is noticed at once"""
NOTE_SECONDS = 60.0


def note(text: str) -> None:
    """Print one line for the person at the terminal."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def wait_until_up(what: str, url: str, alive: Callable[[], bool]) -> bool:
    """Wait until `url` answers; False if the process has ended instead.

    Raises:
        UserError: it runs and does not answer within START_SECONDS.
    """
    start = time.monotonic()
    next_note = NOTE_SECONDS
    while not answers(url):
        if not alive():
            return False
        waited = time.monotonic() - start
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        if waited > START_SECONDS:
            raise UserError(f"{what} has not answered at {url} for {waited:.0f} s ({load}): run again when it is lower")
        if waited > next_note:
            note(f"{what} has been starting for {waited:.0f} s ({load})")
            next_note += NOTE_SECONDS
        time.sleep(0.1)
    return True


def last_words(text: str) -> str:
    """Of what a server printed, the line that names the error: the last exception, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines or ["it printed nothing"])[-1][:300]


def answers(url: str) -> bool:
    """Whether there is an answer with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
