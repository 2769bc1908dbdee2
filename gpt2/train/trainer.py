"""One training run: what the loop in gpt2.train works with, and the run's way to disk and back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2.config.train import TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.flops import mfu
from gpt2.model.checkpoint import Checkpoints, Snapshot, TrainState, latest, write_checkpoint
from gpt2.stage.directory import StageDir
from gpt2.stage.manifest import Session, TokenizeFacts
from gpt2.stage.torchrun import Interrupted
from gpt2.train.anomaly import Anomalies, Verdict
from gpt2.train.build import build, device_name, fresh
from gpt2.train.loader import Batch, Loader, Prefetcher, places, write_aligned_starts
from gpt2.train.memory import choose, free_bytes, settle_micro_batch
from gpt2.train.run_log import Records
from gpt2.train.signals import Interruption

CHECKPOINTS, ALIGNED_STARTS = "checkpoints", "aligned_starts.npy"


@dataclass
class Progress:
    """Where the run stands; the same fields as in TrainState."""

    step: int = 0
    evaluated: bool = False
    passed_over: int = 0
    skips: int = 0
    val_loss: float | None = None
    speeds: tuple[float, ...] = ()
    mfus: tuple[float, ...] = ()
    train_seconds: float = 0.0
    sessions: tuple[Session, ...] = ()
    """those before this one"""


def is_due(config: TrainConfig, step: int, every: int) -> bool:
    return step % every == 0 or step == config.max_steps


def evaluation_due(config: TrainConfig, step: int) -> bool:
    """Whether validation, the benchmark or samples are due after `step` optimizer steps."""
    return any(is_due(config, step, every) for every in (config.val.every, config.benchmark_every, config.sample.every))


class Job:
    """Everything about one run, on one process. All processes make it alike; rank 0 alone writes.

    Raises:
        UserError: data, memory or numbers that do not fit the configuration, or no usable checkpoint.
    """

    def __init__(self, directory: StageDir, world: World) -> None:
        self.directory, self.world = directory, world
        self.began = time.monotonic()
        self.config = config = directory.config(TrainConfig)
        self.records = Records(directory.path, config.max_steps, active=world.is_main)
        self.interruption = Interruption(world, self._slow)
        shards = directory.input("shards")
        entries = shards.facts(TokenizeFacts).shards
        self.val_shards = [shards.path / entry.path for entry in entries if entry.split == "val"]
        self.benchmark = directory.input("benchmark").path if config.benchmark else None
        loader = self._loader([shards.path / entry.path for entry in entries if entry.split == "train"])

        self.runtime, lines = choose(config, directory.runtime, world, free_bytes(world))
        for line in lines:
            self.records.say(line)
        self.parallel, self.loss_fn = build(config, self.runtime, world)
        self.anomalies = Anomalies(config.anomalies, keep=max(1, config.max_steps // 100))
        self.checkpoints = Checkpoints(directory.path / CHECKPOINTS, config.model, config.checkpoint)
        self.progress = Progress()
        self._host: dict[str, Tensor] = {}
        self._held: Snapshot | None = None
        self._saved_step = -1
        self._recent: list[float] = []
        """seconds of the steps since the last logged line"""
        self.restore()
        self.runtime = settle_micro_batch(config, self.runtime, directory.runtime, world, self.parallel, self.loss_fn)
        parts = places(config.sequences_per_step, world.size, self.micro_batch_size, world.rank)
        self.data = Prefetcher(loader, parts, world.device)

    def close(self) -> None:
        self.data.close()
        self.interruption.close()

    @property
    def micro_batch_size(self) -> int:
        assert self.runtime.micro_batch_size != "auto"
        return self.runtime.micro_batch_size

    @property
    def precision(self) -> str:
        return self.runtime.precision

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
            self.records.say(f"sequences that begin at a document's start hold {share:.1%} of the tokens")
        return loader

    # --------------------------------------------------------------------------------------- to disk and back

    def restore(self) -> None:
        """Put weights, moments, progress and records where the newest good checkpoint has them, or at the start."""
        found = None
        if self.world.is_main:
            self.checkpoints.wait()
            self.checkpoints.clean()
            found = latest(self.checkpoints.root, self.config.model, self.records.say) or fresh(self.config)
            self.checkpoints.forget_after(found.state.step)
            # one that was gone back to stands where it stood, but the data after it is no longer the same
            found = Snapshot(found.state.model_copy(update=self.records.rolled_back(found.state.step)), found.tensors)
        state = TrainState.model_validate(
            self.world.broadcast_json(found.state.model_dump(mode="json") if found else None)
        )
        self.parallel.restore(found.tensors if found else {})
        self.progress = now = Progress(**{name: getattr(state, name) for name in asdict(self.progress)})
        if state.total_seconds and not state.sessions:  # not recorded then: count them as on the devices of now
            now.sessions = (self._session(state.total_seconds),)
        if now.step == self.config.max_steps and now.val_loss is None:
            now.evaluated = False  # not recorded then
        self.anomalies.remember(state.losses, state.grad_norms)
        self.records.go_back_to(now.step, now.evaluated)
        self._saved_step = state.step if state.files else -1
        self._held, self._recent = None, []
        if state.files:
            self.records.say(f"resuming after step {state.step:,} of {self.config.max_steps:,}")

    def _state(self) -> TrainState:
        sessions = self.sessions()
        fields = asdict(self.progress) | {"sessions": sessions, "total_seconds": sum(s.seconds for s in sessions)}
        return TrainState(**fields, losses=tuple(self.anomalies.losses), grad_norms=tuple(self.anomalies.grad_norms))

    def _session(self, seconds: float) -> Session:
        return Session(device=device_name(self.world), processes=self.world.size, seconds=seconds)

    def sessions(self) -> tuple[Session, ...]:
        """All sessions up to now; one on the devices of the session before it continues that one."""
        *before, last = *self.progress.sessions, self._session(time.monotonic() - self.began)
        if before and before[-1].devices == last.devices:
            last = self._session(before.pop().seconds + last.seconds)
        return (*before, last)

    def _snapshot(self) -> Snapshot:
        """Copy everything into this machine's memory (rank 0 alone has it then). Every process must call it."""
        if self._held is not None and self._held.state.step == self.progress.step:
            return Snapshot(self._state(), self._held.tensors)
        self.checkpoints.wait()  # it may still be writing from the same memory
        on_gpu = self.world.device.type == "cuda"
        for name, tensor in self.parallel.tensors():
            if self.world.is_main:
                if name not in self._host:
                    self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
                self._host[name].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(self.world.device)
        self._held = Snapshot(self._state(), self._host)
        return self._held

    def hold(self) -> None:
        """Be ready to be interrupted for as long as the weights do not change. Every process must call it."""
        snapshot = self._snapshot()
        self.interruption.saving_with(lambda: self._write_now(snapshot))

    def _write_now(self, snapshot: Snapshot) -> None:
        self.checkpoints.wait()
        if self.checkpoints.newest_step() != snapshot.state.step:
            self.records.sync()
            write_checkpoint(self.checkpoints.root, snapshot, self.config.model)

    def save_if_due(self) -> None:
        """Begin to write a checkpoint if this step is to have one. Every process must call it."""
        step = self.progress.step
        if step and step != self._saved_step and is_due(self.config, step, self.config.checkpoint.every):
            with self.interruption.waiting():  # two at once would write the same folder
                self._save()
                self.interruption.safe = self.checkpoints.wait

    def _save(self) -> None:
        snapshot = self._snapshot()
        if self.world.is_main:
            self.records.sync()
            self.checkpoints.save(snapshot)
        self._saved_step = snapshot.state.step

    def save_and_leave(self, signal_number: int) -> None:
        """End after a signal, with everything on disk. Every process must call it.

        Raises:
            Interrupted: always.
        """
        if self._saved_step != self.progress.step:
            self._save()
        self.checkpoints.wait()
        self.world.barrier()  # whoever ends first makes torchrun end the others
        if self.world.is_main:
            self.world.publish("saved")  # not before the barrier: who hears it may leave at once
        raise Interrupted(signal_number)

    # ------------------------------------------------------------------------------------------- about one step

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches of the step that is next.

        Raises:
            Interrupted: a signal came, and this process is the only one: it need not wait for the end of a long step,
                since nothing has changed yet. Several first have to agree.
        """
        for batch in self.data.step(self.progress.step + self.progress.passed_over):
            if self.world.size == 1 and self.interruption.requested:
                self.parallel.clear()
                self.interruption.saving_with(None)
                self.save_and_leave(self.interruption.requested)
            yield batch

    def agree(self, loss: Tensor, grad_norm: Tensor) -> tuple[float, float, int]:
        """What all processes decide alike from: this step's loss and gradient norm, and the signal that came, or 0."""
        size = self.world.size
        own = torch.stack([loss.double(), grad_norm.double() / size]).to(self.world.device)
        signal_number = torch.tensor([float(self.interruption.requested or 0)], dtype=torch.float64)
        told = self.world.all_reduce(torch.cat([own, signal_number.to(self.world.device)])).tolist()
        self.interruption.saving_with(None)  # all are here, so nobody is evaluating any more; now the weights change
        came = self.interruption.requested or (15 if told[2] else 0)
        return told[0], told[1], came if told[2] else 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Look at the step that is about to change the weights, and write down what is wrong with it."""
        step, limit = self.progress.step, self.config.anomalies.max_skips
        verdict = self.anomalies.judge(loss, grad_norm)
        if verdict.action == "go on":
            return verdict
        if verdict.action in ("skip", "rollback"):
            self.progress.skips += 1
            if self.progress.skips > limit:
                verdict = verdict._replace(action="stop")
        self.records.say(f"warning: step {step + 1:,}: {verdict}: {verdict.action}")
        if verdict.action != "rollback":
            self._write_anomaly(step + 1, verdict)
        return verdict

    def _write_anomaly(self, step: int, verdict: Verdict, **more: int) -> None:
        value = verdict.value if math.isfinite(verdict.value) else None  # JSON has no NaN
        self.records.anomaly(step, kind=verdict.kind, action=verdict.action, value=value, z=verdict.z, **more)

    def stop(self, verdict: Verdict) -> None:
        """Keep the weights of before this step, and end. Every process must call it.

        Raises:
            UserError: always.
        """
        if self._saved_step != self.progress.step:
            self._save()
        self.checkpoints.wait()
        self.world.barrier()
        raise UserError(
            f"step {self.progress.step + 1:,}: {verdict}; {self.progress.skips} steps skipped or gone back so far, "
            f"{self.config.anomalies.max_skips} allowed. The checkpoints are kept. To pass over such data set "
            f"train.anomalies.on_nonfinite=rollback or on_spike=rollback (a new run; it can begin from "
            f"{self.directory.path / CHECKPOINTS} if that folder is copied into its directory)"
        )

    def roll_back(self, verdict: Verdict) -> None:
        """Return to the last checkpoint, and pass over the data from there to this step's."""
        before = self.progress
        self.parallel.clear()
        self.restore()
        now = self.progress
        # from what was passed over until now, which may be more than when the checkpoint was written
        now.passed_over = before.passed_over + before.step - now.step + 1
        now.skips, now.sessions = before.skips, before.sessions
        places = {"seen_at": before.step + 1, "passed_over": now.passed_over, "skips": now.skips}
        self._write_anomaly(now.step, verdict, **places)

    def advance(self, seconds: float, **metrics: float) -> None:
        """The step is done: count it, and write its line if one is due."""
        now, config = self.progress, self.config
        now.step += 1
        now.evaluated = not evaluation_due(config, now.step)
        now.train_seconds += seconds
        self._recent.append(seconds)
        self.checkpoints.check()
        if not (is_due(config, now.step, self.runtime.log_every) or now.step == 1):
            return
        step_seconds = sum(self._recent) / len(self._recent)
        self._recent = []
        rate = config.total_batch_size / step_seconds
        utilisation = mfu(config.model, rate, device_name(self.world), self.world.size)
        now.speeds += (rate,)
        now.mfus += () if utilisation is None else (utilisation,)
        self.records.metrics(
            now.step,
            **metrics,
            **{
                "train/tokens": now.step * config.total_batch_size,
                "train/tokens_per_second": rate,
                "train/step_ms": step_seconds * 1e3,
                "train/mfu": utilisation,
            },
        )
        self.records.say(
            f"step {now.step:,}/{config.max_steps:,}  loss {metrics['train/loss']:.4f}  "
            f"lr {metrics['train/lr']:.2e}  norm {metrics['train/grad_norm']:.3f}  "
            f"{step_seconds * 1e3:,.0f} ms  {rate:,.0f} tokens/s"
        )

    def _slow(self, text: str) -> None:
        print(f"warning: {text}", flush=True)
        self.records.anomaly(self.progress.step, kind="slow step", action="warn", value=None, z=None)
