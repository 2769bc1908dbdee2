"""Starting a stage's process, and ending it with whatever started it.

The command is one that a person can type: `python -m gpt2.tokenize DIRECTORY`, or torchrun for a stage of several
processes. Its lines are passed on; how it failed is said in one sentence.
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
from gpt2.machine import cpu_count, gpu_names
from gpt2.stage.table import Stage

GRACE_SECONDS = 120.0
"""between SIGTERM and SIGKILL: the time to write a checkpoint (19 GB for 1558M with its optimizer state)"""
TAIL_LINES = 200
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Have glibc keep what is freed. Else each step's logits (400 MB in the demo) come as fresh pages from the kernel: of a
step of the demo's model on two cores that is 0.95 of 2.3 processor seconds, and 0.06 of 1.1 without."""
TETHER = str(Path(__file__).with_name("exit_with_parent.py"))


class StageFailed(Exception):
    """A stage's process did not end well. The text says why in one sentence, and where to look."""

    def __init__(self, message: str) -> None:
        super().__init__(presentable(message))


class StageCrashed(StageFailed):
    """It was killed or died of an exception, so the same command may well go through; not the user's input."""


# --------------------------------------------------------------------------------------------------------- command


def processes(stage: Stage, runtime: Runtime) -> int:
    """Processes of a stage on this machine: one a GPU, or `runtime.processes` where there is none.

    Raises:
        UserError: more GPUs are asked for than there are.
    """
    if not stage.parallel:
        return 1
    have = len(gpu_names())
    if runtime.gpus == "auto":
        return have or runtime.processes
    if runtime.gpus > have:
        raise UserError(f"runtime.gpus is {runtime.gpus}, this machine has {have}: use runtime.gpus={have} or auto")
    return runtime.gpus or runtime.processes


def command(stage: Stage, directory: Path, runtime: Runtime) -> list[str]:
    """How a stage is started on `directory`: plain Python for one process, torchrun for several.

    Raises:
        UserError: several nodes without a rendezvous, or more GPUs asked for than there are.
    """
    count = processes(stage, runtime)
    own = [sys.executable, *stage.command(str(directory))]
    if not stage.parallel or (count == 1 and runtime.nodes == 1):
        return own
    torchrun = "torch.distributed.run"
    if runtime.nodes == 1:
        torchrun, meeting = "gpt2.torchrun", []
    elif runtime.rendezvous is None:
        raise UserError(
            f"runtime.nodes is {runtime.nodes} and runtime.rendezvous is not given: use host:port of node 0"
        )
    else:
        meeting = [
            f"--nnodes={runtime.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={runtime.rendezvous}",
            f"--rdzv-id={directory.parent.name}-{directory.name}",
        ]
    # Each rank is tied to torchrun as torchrun is to the flow: it gives every rank a session of its own.
    rank = [sys.executable, "-I", "-S", TETHER, "0", *own]
    return [sys.executable, "-m", torchrun, *meeting, f"--nproc-per-node={count}", "--no-python", *rank]


def typed(stage: Stage, directory: Path, runtime: Runtime) -> str:
    """The command as a person would type it."""
    words = command(stage, directory, runtime)
    shown = [word for word in words if word not in ("--no-python", "-I", "-S", TETHER, "0")]
    if "torch.distributed.run" in shown:
        start = shown.index("torch.distributed.run")
        shown = ["torchrun", *(word for word in shown[start + 1 :] if word != sys.executable)]
    else:
        shown = ["python", *(word for word in shown if word != sys.executable)]
    return shlex.join(shown)


def environment(stage: Stage, runtime: Runtime) -> dict[str, str]:
    """Variables of the child. OMP_NUM_THREADS: each process gets its share of the cores, else they fight for all.

    What the user has set himself stands.
    """
    ours = {
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # nvidia-smi's: the GPU that is locked is the one that is used
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(GRACE_SECONDS - 20)),
    }
    if stage.parallel:
        ours["OMP_NUM_THREADS"] = str(max(1, cpu_count() // processes(stage, runtime)))
        if runtime.gpus == 0 or not gpu_names():
            ours |= KEEP_MEMORY
    env = {**ours, **os.environ}
    if stage.parallel and runtime.gpus == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


# ------------------------------------------------------------------------------------------------------------- run


def run(
    words: list[str],
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = print,
    on_tick: Callable[[], None] = lambda: None,
    tick_seconds: float = 0.5,
    grace_seconds: float = GRACE_SECONDS,
    keep_open: tuple[int, ...] = (),
) -> None:
    """Run a command to its end; it does not outlive this process, nor an exception in this call.

    Call it from the main thread: the kernel's promise (tether.py) holds as long as the calling *thread* lives, and
    only the main thread is interrupted by Ctrl-C, SIGTERM and a cancellation from Prefect's page.

    Args:
        on_line: called with each line of the child's output, both streams together, in this thread.
        on_tick: called about every `tick_seconds`, in this thread.
        keep_open: descriptors that the child inherits, such as locks that must last as long as it does.

    Raises:
        StageFailed: it said `error: ...`; the text is that line.
        StageCrashed: it ended in any other way than with status 0.
    """
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", TETHER, str(os.getpid()), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=env,
        process_group=0,  # Ctrl-C reaches this process alone, which then ends the child in order
        pass_fds=keep_open,
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    assert child.stdout is not None
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    tail: deque[str] = deque(maxlen=TAIL_LINES)

    def pass_on(line: str) -> None:
        line = without_credentials(line)  # what libraries print is stored by Prefect
        tail.append(line)
        on_line(line)

    try:
        next_tick = time.monotonic()
        while True:
            try:
                line = lines.get(timeout=max(0.0, next_tick - time.monotonic()))
                if line is None:
                    break
                pass_on(line)
            except queue.Empty:
                pass
            if time.monotonic() >= next_tick:
                on_tick()
                next_tick = time.monotonic() + tick_seconds
        status = child.wait()
    except BaseException:
        _end(child, lines, pass_on, grace_seconds)
        raise
    if status:
        raise failure(status, list(tail))


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
    """SIGTERM, time to save, SIGKILL for the whole group. A second interruption skips the waiting."""
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

_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:? ?)?((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning)\b.*)")
_RANK_PREFIX = re.compile(r"^\[rank\d+\]:? ?")


def failure(status: int, tail: list[str]) -> StageFailed:
    """What a child's status and last lines say about why it ended.

    A line `error: ...` is a message for the user, and final. Under torchrun the status is 1 whatever the rank's was,
    and torchrun's own account of it follows: the first rank's exception is the one that counts.
    """
    told = [
        line.removeprefix("error: ")
        for line in (_RANK_PREFIX.sub("", line) for line in tail)
        if line.startswith("error: ")
    ]
    if told:
        return StageFailed(told[-1])
    if status < 0 or status > 128:
        name = signal.Signals(-status if status < 0 else status - 128).name
        if name in ("SIGTERM", "SIGINT"):  # somebody wanted it to end: starting it again would be defiance
            return StageFailed(f"its process was asked to end by {name}; run the same command again to go on")
        hint = " (often the machine ran out of memory)" if name == "SIGKILL" else ""
        return StageCrashed(f"its process was ended by {name}{hint}")
    own = tail[: next((i for i, line in enumerate(tail) if "torch.distributed.elastic" in line), len(tail))]
    raised = [match.group(1) for match in map(_EXCEPTION.match, own or tail) if match]
    if raised:
        return StageCrashed(raised[-1])
    last = next((line for line in reversed(own or tail) if line.strip()), "it printed nothing")
    return StageCrashed(f"exit status {status}: {last.strip()}")
