"""The train stage with an injected fault: `python faulty_train.py DIRECTORY CAUSE PHASE RANK [STEP]`.

PHASE: "step" (before the update that follows STEP, default 5), "validation" (after step 8) or "checkpoint" (while that
of step 8 is written).
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import gpt2.model.checkpoint
from gpt2.distributed import init_process_group
from gpt2.stage import torchrun
from gpt2.train import loop
from gpt2.train.trainer import Trainer

EVALUATED_STEP = 8


def inject(cause: str) -> None:
    if cause == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif cause == "SIGTERM":  # to the launcher, if any, which forwards it to every rank
        if "LOCAL_RANK" in os.environ:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)  # the run would finish before torchrun forwards it
        else:
            os.kill(os.getpid(), signal.SIGTERM)
    elif cause == "hang":
        time.sleep(1000)
    elif cause == "exception":
        raise RuntimeError("a fault of this test")
    else:  # no file can grow past the present size of metrics.jsonl
        size = Path(sys.argv[1], "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))


def before(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Inject the fault once, before the first call for which `when` is true."""
    original, injected = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not injected and when(*args):
            injected.append(True)
            inject(sys.argv[2])
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def main() -> None:
    torchrun.init_process_group = partial(init_process_group, timeout=timedelta(seconds=15))  # type: ignore[assignment]
    phase, rank, *given = sys.argv[3:]
    step = int(given[0]) if given else 5
    if os.environ.get("RANK", "0") == rank:
        if phase == "step":
            before(Trainer, "check_anomaly", lambda trainer, *_: trainer.progress.step == step)
        elif phase == "validation":
            before(loop, "validate", lambda trainer, _: trainer.progress.step == EVALUATED_STEP)
        else:
            before(gpt2.model.checkpoint, "write_tensors", lambda path, _: "08.tmp/optimizer" in str(path))
    torchrun.exit_now(torchrun.main(loop.work, sys.argv[1]))


if __name__ == "__main__":
    main()
