"""The train stage with one fault, for tests: `python faulty_train.py DIRECTORY CAUSE PHASE RANK [STEP]`.

PHASE says where in the run it strikes: in a step (the sixth, or the one after STEP), in the validation after step 8, or
in the middle of writing the checkpoint of step 8.
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
import gpt2.train.evaluation
from gpt2.distributed import init_process_group
from gpt2.stage import torchrun
from gpt2.train import loop
from gpt2.train.trainer import Job

EVALUATED_STEP = 8


def strike(cause: str) -> None:
    if cause == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif cause == "SIGTERM":  # of the launcher, if there is one: it passes it on to every rank
        if "LOCAL_RANK" in os.environ:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)  # so small a run would be over before it has passed it on
        else:
            os.kill(os.getpid(), signal.SIGTERM)
    elif cause == "hang":
        time.sleep(1000)
    elif cause == "exception":
        raise RuntimeError("a fault of this test")
    else:  # from now on no file can grow past what the metrics have reached
        size = Path(sys.argv[1], "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))


def before(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Let the fault strike once, before a call for which `when` holds."""
    original, struck = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not struck and when(*args):
            struck.append(True)
            strike(sys.argv[2])
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def main() -> None:
    torchrun.init_process_group = partial(init_process_group, timeout=timedelta(seconds=15))  # type: ignore[assignment]  # so that a hang ends soon
    phase, rank, *given = sys.argv[3:]
    step = int(given[0]) if given else 5
    if os.environ.get("RANK", "0") == rank:
        if phase == "step":
            before(Job, "judge", lambda job, *_: job.progress.step == step)
        elif phase == "validation":
            before(gpt2.train.evaluation, "_val_loss", lambda job, _: job.progress.step == EVALUATED_STEP)
        else:
            before(gpt2.model.checkpoint, "write_tensors", lambda path, _: "08.tmp/optimizer" in str(path))
    torchrun.exit_now(torchrun.main(loop.work, sys.argv[1]))


if __name__ == "__main__":
    main()
