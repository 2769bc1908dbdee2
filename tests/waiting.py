"""Waiting for what other processes do: for a condition, never for a time or for a file merely to exist."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def written(path: Path) -> str:
    """What another process has written to the file in one piece; "" before. The file exists a moment earlier."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
