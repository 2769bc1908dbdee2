"""The train stage: `python -m gpt2.train DIRECTORY`, or the same under torchrun on several GPUs or nodes.

It goes on from the newest checkpoint in its directory; there is no option for that. SIGTERM and SIGINT save first and
end with status 143 or 130. Status 2 comes with one line `error: ...`, 1 with a traceback.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from gpt2.atomic import NO_SPACE
from gpt2.build import device_name, has_fp8_head
from gpt2.checkpoint import folder_name, read_state
from gpt2.distributed import World, join, leave, locate
from gpt2.errors import REFUSED, UserError, describe
from gpt2.flops import flops_per_token, mfu
from gpt2.interruption import Interrupted
from gpt2.job import CHECKPOINTS, Job
from gpt2.machine import keep_compiled
from gpt2.manifest import TrainFacts
from gpt2.memory import explain_out_of_memory
from gpt2.optim import learning_rate
from gpt2.periodic import evaluate
from gpt2.stage import StageDir


def train(job: Job) -> None:
    """From where the job stands to its last step.

    Raises:
        Interrupted: a signal came; everything is saved.
        UserError: an anomaly that the configuration says to stop at, or no space for a checkpoint.
    """
    config = job.config
    while True:
        now = job.progress
        if not now.evaluated:
            job.hold()
            evaluate(job)
            now.evaluated = True
            job.hold()
        job.save_if_due()
        if now.step == config.max_steps:
            return

        began = time.perf_counter()
        job.interruption.step_begins()
        loss = torch.zeros((), device=job.world.device)
        for micro_step, batch in enumerate(job.batches(), start=1):
            # weighted by its share of the step's sequences, so that sums over micro-steps and processes are the mean
            share = job.loss_fn(batch.idx, batch.targets) * (len(batch.idx) / config.sequences_per_step)
            loss += share.detach()
            job.parallel.backward(share, last=micro_step == len(job.data.parts))
        grad_norm = job.parallel.clip(config.optim.grad_clip)
        step_loss, step_norm, signal_number = job.agree(loss, grad_norm)

        verdict = job.judge(step_loss, step_norm)
        if verdict.action == "stop":
            job.stop(verdict)
        if verdict.action == "rollback":
            job.roll_back(verdict)
            continue
        lr = learning_rate(config.optim, config.max_steps, now.step)
        if verdict.action != "skip":
            job.parallel.step(lr)
        job.parallel.clear()
        job.interruption.step_ends()
        seconds = time.perf_counter() - began
        job.advance(seconds, **{"train/loss": step_loss, "train/lr": lr, "train/grad_norm": step_norm})
        if signal_number:
            job.save_and_leave(signal_number)


def finish(job: Job) -> None:
    """Write the manifest over the final checkpoint and the records; its numbers come from the checkpoint's state."""
    config, world, now = job.config, job.world, job.progress
    job.checkpoints.wait()
    if not world.is_main:
        return
    folder = f"{CHECKPOINTS}/{folder_name(config.max_steps)}"
    written = read_state(job.directory.path / folder).files
    if now.val_loss is None or not math.isfinite(now.val_loss):
        raise UserError(f"the validation loss of the final weights in {job.directory.path} is not finite")
    tokens, sessions = config.max_steps * config.total_batch_size, job.sessions()
    # a run that logged nothing since speeds are recorded has only the mean over all steps
    rate = statistics.median(now.speeds or [tokens / now.train_seconds])
    facts = TrainFacts(
        steps=config.max_steps,
        tokens=tokens,
        n_params=config.model.n_params(),
        train_loss=statistics.fmean(list(job.anomalies.losses)[-max(1, config.max_steps // 100) :]),
        val_loss=now.val_loss,
        train_seconds=now.train_seconds,
        total_seconds=sum(session.seconds for session in sessions),
        sessions=sessions,
        tokens_per_second=rate,
        flops_per_token=flops_per_token(config.model),
        mfu=statistics.median(now.mfus) if now.mfus else mfu(config.model, rate, device_name(world), world.size),
        device=", ".join(dict.fromkeys(session.devices for session in sessions)),
        world_size=world.size,
        precision=job.precision,
        fp8_head=has_fp8_head(job.loss_fn),
        checkpoint=folder,
    )
    hashes = {f"{folder}/{name}": file.sha256 for name, file in written.items()}
    files = [*hashes, f"{folder}/state.json", *job.records.files()]
    job.directory.finish(files, facts, sha256=hashes)
    job.records.say(f"done: val loss {facts.val_loss:.4f} after {facts.steps:,} steps, {rate:,.0f} tokens/s")


# ------------------------------------------------------------------------------------------------------------ process


def run(path: Path, world: World) -> None:
    """Lock the directory, train unless it is finished already, write the manifest."""
    directory = StageDir(path)
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(directory.lock())
            finished = not directory.begin()
            world.tell("locked", "finished" if finished else "go on")
        else:
            finished = world.wait_for("locked") == "finished"
        if finished:
            return
        join(world)
        job = Job(directory, world)
        try:
            train(job)
        except torch.OutOfMemoryError as error:
            raise explain_out_of_memory(error, job.runtime) from error
        finish(job)
        world.barrier()
        job.close()
        leave()


def main(arguments: list[str]) -> int:
    """Run the stage; the exit status."""
    if len(arguments) != 1:
        print("usage: python -m gpt2.train DIRECTORY", file=sys.stderr)
        return 2
    world: World | None = None
    try:
        path = Path(arguments[0])
        runtime = StageDir(path).runtime
        world = locate("cpu" if runtime.gpus == 0 else None)
        set_determinism(runtime.deterministic)
        keep_compiled()
        run(path, world)
    except Interrupted as interrupted:
        if world is not None and world.is_main:
            print(interrupted, file=sys.stderr, flush=True)
        return interrupted.status
    except BaseException as error:
        if world is not None and world.heard("saved"):
            return 143  # rank 0 saved after a signal and left; what broke here is that it is gone
        return report(error, world)
    return 0


def set_determinism(wanted: bool | Literal["auto"]) -> None:
    """Have torch use only algorithms that give the same bits each time (and refuse those that have no such form); by
    "auto" where there is no GPU."""
    wanted = not torch.cuda.is_available() if wanted == "auto" else wanted
    torch.use_deterministic_algorithms(wanted)
    if wanted and torch.cuda.is_available():
        from torch._inductor import config as inductor

        if hasattr(inductor, "deterministic"):
            inductor.deterministic = True  # else it picks kernels by how fast they were this time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time


def report(error: BaseException, world: World | None) -> int:
    """Say what ended this process, unless another process of the run ended first and said it; the exit status.

    A message for the user is one line and status 2, anything else a traceback and status 1.
    """
    status = 1
    lines = "".join(traceback.format_exception(error)).rstrip().split("\n")
    if isinstance(error, UserError):
        status, lines = 2, [f"error: {error}"]
    elif isinstance(error, OSError) and error.errno in NO_SPACE:
        where = f" for {error.filename}" if error.filename else ""
        status, lines = 2, [f"error: no space left{where}: free some and run again, finished work is kept"]
    elif isinstance(error, OSError) and error.errno in REFUSED:
        status, lines = 2, [f"error: {describe(error)}"]
    prefix = f"[rank {world.rank}] " if world is not None and world.size > 1 and status == 1 else ""
    if world is not None and not world.first_to_say("failed"):
        lines = ["ends because another process failed first"]
    elif status == 1:
        get_error_handler().record_exception(error)  # for torchrun's own account of it
    print("\n".join(prefix + line for line in lines), file=sys.stderr, flush=True)
    return status


def end(status: int) -> None:
    """End now: a process that failed must not wait for threads or for collectives that nobody answers any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
