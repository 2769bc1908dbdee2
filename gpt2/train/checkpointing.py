"""Saves and restores a training run: from the ranks to rank 0's memory to disk, and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpt2.config.train import TrainConfig
from gpt2.distributed import World
from gpt2.model.checkpoint import Checkpoints, Snapshot, TrainState, latest, write_checkpoint
from gpt2.stage.torchrun import Interrupted
from gpt2.train.build import initial_snapshot
from gpt2.train.parallel import ParallelModel
from gpt2.train.run_log import RunLog
from gpt2.train.signals import SignalWatcher


class Checkpointer:
    """The checkpoints of one run. Every method except `check` is collective."""

    def __init__(
        self,
        root: Path,
        config: TrainConfig,
        world: World,
        parallel: ParallelModel,
        log: RunLog,
        signals: SignalWatcher,
    ) -> None:
        self.config, self.world, self.parallel, self.log, self.signals = config, world, parallel, log, signals
        self.files = Checkpoints(root, config.model, config.checkpoint)
        self._host_tensors: dict[str, Tensor] = {}
        self._snapshot_step = self._saved_step = -1

    def restore(self) -> TrainState:
        """Load the newest readable checkpoint, or the initial weights; delete log lines and checkpoints of later steps.

        Returns:
            The state of the checkpoint. If the run was rolled back to it, with the data to skip since.

        Raises:
            UserError: no checkpoint is readable, or `init_from` is not.
        """
        snapshot = None
        if self.world.is_main:
            self.files.wait()
            self.files.clean()
            snapshot = latest(self.files.root, self.config.model, self.log.print) or initial_snapshot(self.config)
            self.files.delete_after(snapshot.state.step)
            snapshot.state = snapshot.state.model_copy(update=self.log.last_rollback(snapshot.state.step))
        state = TrainState.model_validate(
            self.world.broadcast_json(snapshot.state.model_dump(mode="json") if snapshot else None)
        )
        self.parallel.load_state_tensors(snapshot.tensors if snapshot else {})
        if state.step == self.config.max_steps and state.val_loss is None:  # written before the field existed
            state = state.model_copy(update={"evaluated": False})
        self.log.truncate(state.step, state.evaluated)
        self._snapshot_step, self._saved_step = -1, state.step if state.files else -1
        if state.files:
            self.log.print(f"resuming after step {state.step:,} of {self.config.max_steps:,}")
        return state

    def save(self, state: TrainState) -> None:
        """Start to write a checkpoint in the background, unless this step has one."""
        if self._saved_step != state.step:
            with self.signals.blocked():  # the signal thread would write to the same folder
                self._save(state)
                self.signals.save = self.files.wait

    def _save(self, state: TrainState) -> None:
        snapshot = self._snapshot(state)
        if self.world.is_main:
            self.log.sync()
            self.files.save(snapshot)
        self._saved_step = state.step

    def _snapshot(self, state: TrainState) -> Snapshot:
        """Copy weights and optimizer state to rank 0's memory, if not done for this step."""
        if self._snapshot_step != state.step:
            self.files.wait()  # may still write from the same memory
            on_gpu = self.world.device.type == "cuda"
            for name, tensor in self.parallel.state_tensors():
                if self.world.is_main:
                    if name not in self._host_tensors:
                        self._host_tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
                    self._host_tensors[name].copy_(tensor, non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize(self.world.device)
            self._snapshot_step = state.step
        return Snapshot(state, self._host_tensors)

    def save_on_signal(self, state: TrainState) -> None:
        """Take a snapshot, which the signal thread can write at any time until the weights change."""
        self.signals.save_with(partial(self._write, self._snapshot(state)))

    def _write(self, snapshot: Snapshot) -> None:
        self.files.wait()
        if self.files.newest_step() != snapshot.state.step:
            self.log.sync()
            write_checkpoint(self.files.root, snapshot, self.config.model)

    def save_and_wait(self, state: TrainState) -> None:
        """Save this step and wait until every rank can exit; call `signals.save_with(None)` before."""
        if self._saved_step != state.step:
            self._save(state)
        self.files.wait()
        self.world.barrier()  # torchrun ends all ranks as soon as one exits

    def save_and_exit(self, state: TrainState, signal_number: int) -> None:
        """Save, then end the run because of a signal.

        Raises:
            Interrupted: always.
        """
        self.save_and_wait(state)
        if self.world.is_main:
            self.world.publish("saved")  # after the barrier: a rank that reads it may exit at once
        raise Interrupted(signal_number)

    def check(self) -> None:
        """Raise the error of a background write that has failed; does not wait."""
        self.files.check()

    def wait(self) -> None:
        """Wait for the background write; raises its error."""
        self.files.wait()
