"""Start a stage's process, forward its output, end it with its parent, and report in one sentence why it failed.

The command also works in a shell: `python -m gpt2.tokenize DIRECTORY`, or torchrun for several processes.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from gpt2.config.runtime import Runtime
from gpt2.errors import UserError, presentable, without_credentials
from gpt2.machine import cpu_count, device_type, gpu_count
from gpt2.stage.failure import clear_failure, read_failure
from gpt2.stage.table import Stage
from tasks.environment import child_environment

GRACE_SECONDS = 120.0
"""between SIGTERM and SIGKILL, to write a checkpoint (19 GB for 1558M with its optimizer state)"""
TAIL_LINES = 200
GLIBC_KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""malloc keeps freed memory. By default each step's logits (400 MB in the demo) are new pages from the kernel: measured
on two cores with the demo's model, 0.95 of 2.3 processor seconds per step, and 0.06 of 1.1 with these settings."""
EXIT_WITH_PARENT = str(Path(__file__).with_name("exit_with_parent.py"))


class StageFailed(Exception):
    """A stage's process failed. The text gives the reason in one sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(presentable(message))


class StageCrashed(StageFailed):
    """It was killed or raised an exception; a retry may succeed."""


# --------------------------------------------------------------------------------------------------------- command


def process_count(stage: Stage, runtime: Runtime) -> int:
    """Processes of a stage on this machine: one per GPU, or `runtime.processes` without GPUs.

    Raises:
        UserError: runtime.gpus exceeds the number of visible GPUs.
    """
    if not stage.parallel:
        return 1
    return gpu_count(runtime.gpus) or runtime.processes


def exit_with_parent(words: list[str], parent: int) -> list[str]:
    """`words` such that the kernel sends them SIGTERM when process `parent` dies; 0: whichever process starts them."""
    return [sys.executable, "-I", "-S", EXIT_WITH_PARENT, str(parent), *words]


def command(stage: Stage, directory: Path, runtime: Runtime) -> list[str]:
    """The command that runs a stage on `directory`: plain Python for one process, torchrun for several.

    Raises:
        UserError: several nodes without a rendezvous, or runtime.gpus exceeds the number of visible GPUs.
    """
    count = process_count(stage, runtime)
    rank = [sys.executable, *stage.command(str(directory))]
    if not stage.parallel or (count == 1 and runtime.nodes == 1):
        return rank
    torchrun, rendezvous = "gpt2.torchrun", list[str]()
    if runtime.nodes > 1:
        if runtime.rendezvous is None:
            raise UserError(
                f"runtime.nodes is {runtime.nodes} and runtime.rendezvous is not given: use host:port of node 0"
            )
        torchrun = "torch.distributed.run"
        rendezvous = [
            f"--nnodes={runtime.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={runtime.rendezvous}",
            f"--rdzv-id={directory.parent.name}-{directory.name}",
        ]
    # torchrun starts each rank in a new session, so signals to torchrun's process group do not reach them.
    rank = exit_with_parent(rank, 0)
    return [sys.executable, "-m", torchrun, *rendezvous, f"--nproc-per-node={count}", "--no-python", *rank]


def shell_command(stage: Stage, directory: Path, runtime: Runtime) -> str:
    """The same command without exit_with_parent, for a shell in an activated environment."""
    hidden = {"--no-python", *exit_with_parent([], 0)}
    words = ["python", *(word for word in command(stage, directory, runtime) if word not in hidden)]
    if words[1:3] == ["-m", "torch.distributed.run"]:
        words[:3] = ["torchrun"]
    return shlex.join(words)


def environment(stage: Stage, runtime: Runtime) -> dict[str, str]:
    """Environment of a stage's process; variables that the user has set take precedence."""
    defaults = {
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # nvidia-smi's: the locked GPU is the one in use
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(GRACE_SECONDS - 20)),
    }
    if stage.parallel:
        # torch takes all cores in each process by default
        defaults["OMP_NUM_THREADS"] = str(max(1, cpu_count() // process_count(stage, runtime)))
        if not gpu_count(runtime.gpus):
            defaults |= GLIBC_KEEP_FREED_MEMORY
    hide_gpus = {"CUDA_VISIBLE_DEVICES": ""} if stage.parallel and device_type(runtime.gpus) == "cpu" else {}
    return child_environment(defaults=defaults, overrides=hide_gpus)


# ------------------------------------------------------------------------------------------------------------- run


def run(
    words: list[str],
    *,
    directory: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = print,
    on_tick: Callable[[], None] = lambda: None,
    tick_seconds: float = 0.5,
    grace_seconds: float = GRACE_SECONDS,
    keep_open: tuple[int, ...] = (),
) -> None:
    """Run a command until it exits. It ends with this process, and on an exception in this call.

    Call it from the main thread: PR_SET_PDEATHSIG follows the *thread* that starts the child, and only the main thread
    receives Ctrl-C, SIGTERM and a cancellation from Prefect's page.

    Args:
        directory: of the stage, whose failure.json gives the reason of a failure.
        on_line: called with each line of stdout and stderr, in this thread.
        on_tick: called about every `tick_seconds`, in this thread.
        keep_open: descriptors that the child inherits, such as locks that last until it ends.

    Raises:
        StageFailed: the command failed because of its input, or was interrupted.
        StageCrashed: it exited with a status other than 0 for another reason.
    """
    if directory is not None:
        clear_failure(directory)
    child = subprocess.Popen(
        exit_with_parent(words, os.getpid()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=env,
        process_group=0,  # Ctrl-C reaches this process only, which then sends SIGTERM to the child
        pass_fds=keep_open,
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    assert child.stdout is not None
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    tail: deque[str] = deque(maxlen=TAIL_LINES)

    def forward(line: str) -> None:
        line = without_credentials(line)  # Prefect stores the line
        tail.append(line)
        on_line(line)

    try:
        next_tick = time.monotonic()
        while True:
            try:
                line = lines.get(timeout=max(0.0, next_tick - time.monotonic()))
                if line is None:
                    break
                forward(line)
            except queue.Empty:
                pass
            if time.monotonic() >= next_tick:
                on_tick()
                next_tick = time.monotonic() + tick_seconds
        status = child.wait()
    except BaseException:
        _end(child, lines, forward, grace_seconds)
        raise
    if status:
        raise failure(status, list(tail), directory)


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _end(
    child: subprocess.Popen[str],
    lines: queue.SimpleQueue[str | None],
    on_line: Callable[[str], None],
    grace_seconds: float,
) -> None:
    """Send SIGTERM, wait for the child to save, then SIGKILL its group. A second interruption skips the wait."""
    try:
        child.terminate()
        until = time.monotonic() + grace_seconds
        while child.poll() is None and time.monotonic() < until:
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                continue
            if line is None:
                child.wait(max(0.0, until - time.monotonic()))
                break
            on_line(line)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


# --------------------------------------------------------------------------------------------------------- failure

STOP_SIGNALS = ("SIGTERM", "SIGINT")
_TORCHRUN_LINE = re.compile(r"torch[./]distributed[./]elastic")
_TORCHRUN_SUMMARY = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID")


def failure(status: int, tail: list[str], directory: Path | None = None) -> StageFailed:
    """The reason of a failure: failure.json, else the signal, else the last line of output.

    Args:
        status: exit status; negative, or above 128, for a signal.
        tail: last lines of output.
        directory: of the stage; None for a process that writes no failure.json.
    """
    signal_name = _signal(status, tail)
    recorded = read_failure(directory) if directory is not None else None
    if recorded is not None and recorded.kind == "interrupted" and signal_name not in (None, *STOP_SIGNALS):
        recorded = None  # torchrun stopped the other ranks after one was killed
    if recorded is not None:
        return StageCrashed(recorded.message) if recorded.kind == "crash" else StageFailed(recorded.message)
    if signal_name in STOP_SIGNALS:  # no retry: the process was stopped on purpose
        return StageFailed(f"the process received {signal_name}; run the same command again to continue")
    if signal_name is not None:
        hint = " (often the machine ran out of memory)" if signal_name == "SIGKILL" else ""
        return StageCrashed(f"the process received {signal_name}{hint}")
    summary = next((i for i, line in enumerate(tail) if _TORCHRUN_LINE.search(line)), len(tail))
    last = next((line.strip() for line in reversed(tail[:summary] or tail) if line.strip()), "no output")
    if last.startswith("error: "):
        return StageFailed(last.removeprefix("error: "))
    return StageCrashed(f"exit status {status}: {last}")


def _signal(status: int, tail: list[str]) -> str | None:
    """The signal that ended the process or, in torchrun's summary, a rank."""
    number = -status if status < 0 else status - 128
    if number in {*signal.Signals}:
        return signal.Signals(number).name
    matches = filter(None, map(_TORCHRUN_SUMMARY.search, tail))
    return next((match[1] for match in matches if match[1] not in STOP_SIGNALS), None)
