"""The train stage: `python -m gpt2.train DIRECTORY`, or the same under torchrun on several GPUs or nodes.

It goes on from the newest checkpoint in its directory; there is no option for that. SIGTERM and SIGINT save first and
end with status 143 or 130. Status 2 comes with one line `error: ...`, 1 with a traceback.
"""

from __future__ import annotations

import math
import statistics
import time

import torch

from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.flops import flops_per_token, mfu
from gpt2.model.checkpoint import folder_name, read_state
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TrainFacts
from gpt2.train.build import device_name, has_fp8_head
from gpt2.train.evaluation import evaluate
from gpt2.train.memory import explain_out_of_memory
from gpt2.train.optim import learning_rate
from gpt2.train.trainer import CHECKPOINTS, Job


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


def work(directory: StageDir, world: World) -> None:
    """Train and write the manifest; called on each rank, with the directory locked."""
    job = Job(directory, world)
    try:
        train(job)
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error, job.runtime) from error
    finish(job)
    world.barrier()
    job.close()
