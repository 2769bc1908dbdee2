"""The train stage: `python -m gpt2.train DIRECTORY`, or the same under torchrun on several GPUs or nodes.

Resumes from the newest checkpoint in DIRECTORY; there is no option for it. SIGTERM and SIGINT save a checkpoint, then
exit with status 143 or 130. Status 2 comes with one line `error: ...`, status 1 with a traceback.
"""

from __future__ import annotations

import signal
import statistics
import time

import torch

from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.flops import flops_per_token, mfu
from gpt2.model.checkpoint import folder_name, read_state
from gpt2.stage.directory import StageDir
from gpt2.stage.manifest import TrainFacts
from gpt2.train.build import device_name, has_fp8_head
from gpt2.train.evaluation import run_benchmark, sample, validate
from gpt2.train.memory import explain_out_of_memory
from gpt2.train.optim import learning_rate
from gpt2.train.progress import evaluation_due, is_due
from gpt2.train.step import train_step
from gpt2.train.trainer import CHECKPOINTS, Trainer


def train(trainer: Trainer) -> None:
    """Train from the current step to the last one.

    Raises:
        Interrupted: a signal was received; a checkpoint is saved.
        UserError: an anomaly for which the configuration says "stop", or no space for a checkpoint.
    """
    config, world, checkpointer, signals = trainer.config, trainer.world, trainer.checkpointer, trainer.signals
    while True:
        progress = trainer.progress
        step = progress.step

        # once in a while: validation loss, benchmark, samples; on a signal a snapshot is saved at once
        if not progress.evaluated:
            checkpointer.save_on_signal(trainer.state())
            with trainer.parallel.full_parameters() as model:
                if is_due(config, step, config.val.every):
                    validate(trainer, model)
                if step and config.benchmark and is_due(config, step, config.benchmark_every):
                    run_benchmark(trainer, model)
                if step and is_due(config, step, config.sample.every):
                    sample(trainer, model)
            progress.evaluated = True
            checkpointer.save_on_signal(trainer.state())

        # once in a while: checkpoint, written in the background
        if step and is_due(config, step, config.checkpoint.every):
            checkpointer.save(trainer.state())

        if step == config.max_steps:
            return

        lr = learning_rate(config.optim, config.max_steps, step)
        start = time.perf_counter()
        with signals.watch_step():
            result = train_step(
                trainer.parallel,
                trainer.loss_fn,
                trainer.micro_batches(),
                len(trainer.data.slices),
                lr,
                config,
                world,
                check_anomaly=trainer.check_anomaly,
                signal_number=lambda: signals.signal_number,
            )
        if result.verdict.action == "stop":
            trainer.stop(result.verdict)
        if result.verdict.action == "rollback":
            trainer.roll_back(result.verdict)
            continue
        progress.step += 1
        progress.evaluated = not evaluation_due(config, progress.step)
        trainer.add_step_seconds(time.perf_counter() - start)
        checkpointer.check()

        # once in a while: metrics
        if is_due(config, progress.step, trainer.runtime.log_every) or progress.step == 1:
            trainer.log_step(result, lr)

        if result.signal_received:
            checkpointer.save_and_exit(trainer.state(), signals.signal_number or signal.SIGTERM)


def write_manifest(trainer: Trainer) -> None:
    """Write the manifest of the final checkpoint and the log files; its facts come from the checkpoint's state."""
    config, world, progress = trainer.config, trainer.world, trainer.progress
    trainer.checkpointer.wait()
    if not world.is_main:
        return
    folder = f"{CHECKPOINTS}/{folder_name(config.max_steps)}"
    checkpoint_files = read_state(trainer.directory.path / folder).files
    if progress.val_loss is None:
        raise UserError(f"the validation loss of the final weights in {trainer.directory.path} is not finite")
    tokens, sessions = config.max_steps * config.total_batch_size, trainer.sessions()
    # without logged speeds (a checkpoint from before they were recorded) the mean over all steps
    tokens_per_second = statistics.median(progress.speeds or [tokens / progress.train_seconds])
    utilisation = (
        statistics.median(progress.mfus)
        if progress.mfus
        else mfu(config.model, tokens_per_second, device_name(world), world.size)
    )
    facts = TrainFacts(
        steps=config.max_steps,
        tokens=tokens,
        n_params=config.model.n_params(),
        train_loss=statistics.fmean(list(trainer.anomalies.losses)[-max(1, config.max_steps // 100) :]),
        val_loss=progress.val_loss,
        train_seconds=progress.train_seconds,
        total_seconds=sum(session.seconds for session in sessions),
        sessions=sessions,
        tokens_per_second=tokens_per_second,
        flops_per_token=flops_per_token(config.model),
        mfu=utilisation,
        device=", ".join(dict.fromkeys(session.devices for session in sessions)),
        world_size=world.size,
        precision=trainer.runtime.precision,
        fp8_head=has_fp8_head(trainer.loss_fn),
        checkpoint=folder,
    )
    hashes = {f"{folder}/{name}": file.sha256 for name, file in checkpoint_files.items()}
    files = [*hashes, f"{folder}/state.json", *trainer.log.files()]
    trainer.directory.finish(files, facts, sha256=hashes)
    trainer.log.print(
        f"done: val loss {facts.val_loss:.4f} after {facts.steps:,} steps, {tokens_per_second:,.0f} tokens/s"
    )


def work(directory: StageDir, world: World) -> None:
    """Train and write the manifest; called on each rank, with the directory locked."""
    trainer = Trainer(directory, world)
    try:
        train(trainer)
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error, trainer.runtime) from error
    write_manifest(trainer)
    world.barrier()
    trainer.close()
