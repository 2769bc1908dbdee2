"""The state of one training run on one rank: what the loop in gpt2.train.loop works with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from gpt2.config.train import TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.flops import mfu
from gpt2.model.checkpoint import TrainState
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import Session, TokenizeFacts
from gpt2.train.anomaly import AnomalyDetector, Verdict
from gpt2.train.build import build_model, device_name
from gpt2.train.checkpointing import Checkpointer
from gpt2.train.loader import Batch, Loader, Prefetcher, micro_batch_slices, write_aligned_starts
from gpt2.train.memory import free_bytes, resolve_runtime, tune_micro_batch
from gpt2.train.progress import Progress
from gpt2.train.run_log import RunLog
from gpt2.train.signals import SignalWatcher
from gpt2.train.step import StepResult

CHECKPOINTS, ALIGNED_STARTS = "checkpoints", "aligned_starts.npy"


class Trainer:
    """Model, data, checkpoints, log and progress of a run. Constructed on every rank; rank 0 alone writes files.

    Raises:
        UserError: data, memory or settings do not fit the configuration, or no checkpoint is readable.
    """

    def __init__(self, directory: StageDir, world: World) -> None:
        self.directory, self.world = directory, world
        self.start = time.monotonic()
        self.config = config = directory.config(TrainConfig)
        self.log = RunLog(directory.path, config.max_steps, active=world.is_main)
        self.signals = SignalWatcher(world, self._log_slow_step)
        shards = directory.input("shards")
        entries = shards.facts(TokenizeFacts).shards
        self.val_shards = [shards.path / entry.path for entry in entries if entry.split == "val"]
        self.benchmark = directory.input("benchmark").path if config.benchmark else None
        loader = self._loader([shards.path / entry.path for entry in entries if entry.split == "train"])

        self.runtime, lines = resolve_runtime(config, directory.runtime, world, free_bytes(world))
        for line in lines:
            self.log.print(line)
        self.parallel, self.loss_fn = build_model(config, self.runtime, world)
        self.anomalies = AnomalyDetector(config.anomalies, keep=max(1, config.max_steps // 100))
        self.checkpointer = Checkpointer(
            directory.path / CHECKPOINTS, config, world, self.parallel, self.log, self.signals
        )
        self._step_seconds: list[float] = []
        """of the steps since the last logged one"""
        self.restore()
        self.runtime = tune_micro_batch(config, self.runtime, directory.runtime, world, self.parallel, self.loss_fn)
        slices = micro_batch_slices(config.sequences_per_step, world.size, self.micro_batch_size, world.rank)
        self.data = Prefetcher(loader, slices, world.device)

    def close(self) -> None:
        self.data.close()
        self.signals.close()

    @property
    def micro_batch_size(self) -> int:
        assert self.runtime.micro_batch_size != "auto"
        return self.runtime.micro_batch_size

    def _loader(self, shards: list[Path]) -> Loader:
        config, starts = self.config, None
        if config.align_documents:
            starts = self.directory.path / ALIGNED_STARTS
            write_aligned_starts(shards, config.model.block_size, starts, self.world)
        loader = Loader(
            shards, config.model.block_size, config.sequences_per_step, config.seed, config.model.vocab_size,
            shuffle=config.shuffle, starts=starts,
        )  # fmt: skip
        if starts is not None:
            share = loader.n_sequences * config.model.block_size / len(loader.stream)
            self.log.print(f"sequences aligned to document starts use {share:.1%} of the tokens")
        return loader

    def micro_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of the next step.

        Raises:
            Interrupted: a single-process run has received a signal; nothing has changed since the last step. Several
                ranks agree in `train_step` instead.
        """
        for batch in self.data.micro_batches(self.progress.step + self.progress.skipped_batches):
            if self.world.size == 1 and self.signals.signal_number:
                self.signals.save_with(None)
                self.checkpointer.save_and_exit(self.state(), self.signals.signal_number)
            yield batch

    # -------------------------------------------------------------------------------------------------------- state

    def restore(self) -> None:
        """Load the newest checkpoint, or the initial weights."""
        state = self.checkpointer.restore()
        self.progress = Progress.from_state(state)
        if state.total_seconds and not state.sessions:  # written before the field existed: assume this machine
            self.progress.sessions = (self._session(state.total_seconds),)
        self.anomalies.restore(state.losses, state.grad_norms)
        self._step_seconds = []

    def state(self) -> TrainState:
        progress, sessions = self.progress, self.sessions()
        return TrainState(
            step=progress.step,
            evaluated=progress.evaluated,
            passed_over=progress.skipped_batches,
            skips=progress.skips,
            losses=tuple(self.anomalies.losses),
            grad_norms=tuple(self.anomalies.grad_norms),
            val_loss=progress.val_loss,
            speeds=progress.speeds,
            mfus=progress.mfus,
            train_seconds=progress.train_seconds,
            total_seconds=sum(session.seconds for session in sessions),
            sessions=sessions,
        )

    def _session(self, seconds: float) -> Session:
        return Session(device=device_name(self.world), processes=self.world.size, seconds=seconds)

    def sessions(self) -> tuple[Session, ...]:
        """All sessions including the current one, which extends the previous one if the devices are the same."""
        *before, last = *self.progress.sessions, self._session(time.monotonic() - self.start)
        if before and before[-1].devices == last.devices:
            last = self._session(before.pop().seconds + last.seconds)
        return (*before, last)

    # ---------------------------------------------------------------------------------------------------- anomalies

    def check_anomaly(self, loss: float, grad_norm: float) -> Verdict:
        """The hook of `train_step` before the weights change: decide on the step, and log what is wrong with it."""
        self.signals.save_with(None)  # all ranks have left the evaluation; from here on a snapshot is out of date
        verdict = self.anomalies.check(loss, grad_norm)
        if verdict.action == "continue":
            return verdict
        if verdict.action in ("skip", "rollback"):
            self.progress.skips += 1
            if self.progress.skips > self.config.anomalies.max_skips:
                verdict = verdict._replace(action="stop")
        step = self.progress.step + 1
        self.log.print(f"warning: step {step:,}: {verdict}: {verdict.action}")
        if verdict.action != "rollback":
            self.log.anomaly(step, **verdict._asdict())
        return verdict

    def stop(self, verdict: Verdict) -> None:
        """Save the weights from before this step, and end the run.

        Raises:
            UserError: always.
        """
        self.checkpointer.save_and_wait(self.state())
        raise UserError(
            f"step {self.progress.step + 1:,}: {verdict}; {self.progress.skips} steps skipped or rolled back, "
            f"max_skips is {self.config.anomalies.max_skips}. The checkpoints are kept. To skip such data set "
            f"train.anomalies.on_nonfinite=rollback or on_spike=rollback (a new run; to start it from these "
            f"checkpoints, copy {self.directory.path / CHECKPOINTS} into its directory)"
        )

    def roll_back(self, verdict: Verdict) -> None:
        """Return to the last checkpoint, and skip the data from there to this step."""
        before = self.progress
        self.restore()
        progress = self.progress
        # more batches may be skipped by now than when the checkpoint was written
        progress.skipped_batches = before.skipped_batches + before.step - progress.step + 1
        progress.skips, progress.sessions = before.skips, before.sessions
        self.log.anomaly(
            progress.step,
            **verdict._asdict(),
            seen_at=before.step + 1,
            passed_over=progress.skipped_batches,
            skips=progress.skips,
        )

    # ------------------------------------------------------------------------------------------------------ logging

    def log_step(self, result: StepResult, lr: float) -> None:
        """Write the metrics of the last step; speed and MFU are means over the steps since the last call."""
        config, progress = self.config, self.progress
        seconds = sum(self._step_seconds) / len(self._step_seconds)
        self._step_seconds = []
        tokens_per_second = config.total_batch_size / seconds
        utilisation = mfu(config.model, tokens_per_second, device_name(self.world), self.world.size)
        progress.speeds += (tokens_per_second,)
        progress.mfus += () if utilisation is None else (utilisation,)
        metrics = {
            "train/loss": result.loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/tokens": progress.step * config.total_batch_size,
            "train/tokens_per_second": tokens_per_second,
            "train/step_ms": seconds * 1e3,
            "train/mfu": utilisation,
        }
        self.log.metrics(progress.step, **metrics)
        self.log.print(
            f"step {progress.step:,}/{config.max_steps:,}  loss {result.loss:.4f}  lr {lr:.2e}  "
            f"norm {result.grad_norm:.3f}  {seconds * 1e3:,.0f} ms  {tokens_per_second:,.0f} tokens/s"
        )

    def add_step_seconds(self, seconds: float) -> None:
        self.progress.train_seconds += seconds
        self._step_seconds.append(seconds)

    def _log_slow_step(self, text: str) -> None:
        print(f"warning: {text}", flush=True)
        self.log.anomaly(self.progress.step, kind="slow step", action="warn", value=None, z=None)
