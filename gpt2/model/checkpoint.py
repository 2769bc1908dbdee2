"""Checkpoints: safetensors and JSON, written by a background thread, atomically, and verified when read.

    checkpoints/step_00005000/
        model.safetensors, config.json     a folder for transformers' GPT2LMHeadModel.from_pretrained
        optimizer.safetensors              AdamW's moments by parameter name, as full tensors
        state.json                         the training state, and size and sha256 of the other files

A folder is written under a temporary name and then renamed, so a folder with its final name is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gpt2.architecture import MODEL_CONFIG, hf_config, read_hf_config
from gpt2.atomic import fsync_dir, write_text
from gpt2.config.section import Section
from gpt2.config.train import CheckpointConfig, ModelConfig
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.model.safetensors_file import read_tensors, write_tensors
from gpt2.model.weights import from_hf_layout, hf_layout, load_hf, to_hf
from gpt2.stage.facts import RelativePath, Session
from gpt2.stage.manifest import OtherVersion, read_model, sha256_file, write_model

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


# ------------------------------------------------------------------------------------------------------------- models


def load_model(folder: Path, device: torch.device | str = "cpu") -> GPT:
    """Read a model from one of our checkpoints or from a Hugging Face GPT-2 folder; fp32, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, or it is not a GPT-2.
    """
    model = GPT(read_hf_config(folder / MODEL_CONFIG))
    load_hf(model, read_tensors(folder / WEIGHTS))
    return model.to(device).eval()


def save_model(folder: Path, model: GPT) -> None:
    """Write model.safetensors and config.json as transformers' GPT2LMHeadModel.from_pretrained reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, {name: tensor.cpu() for name, tensor in to_hf(model).items()})
    write_model_config(folder, model.config)


def write_model_config(folder: Path, config: ModelConfig) -> None:
    write_text(folder / MODEL_CONFIG, json.dumps(hf_config(config), indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------- checkpoints


class FileRecord(Section):
    size: int
    sha256: str


class TrainState(Section):
    """state.json: the training state besides weights and moments. Training uses no random state."""

    format: int = 1
    step: int
    """completed optimizer steps"""
    evaluated: bool
    """whether the evaluations due after `step` (validation, benchmark, samples) are done and logged"""
    passed_over: int = 0
    """batches skipped by rollbacks: step i trains on batch i + passed_over"""
    skips: int = 0
    """skipped steps plus rollbacks"""
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    """of the last steps, for anomaly detection and the final mean"""
    val_loss: float | None = None
    """the last measured one"""
    speeds: tuple[float, ...] = ()
    """train/tokens_per_second of each logged line"""
    mfus: tuple[float, ...] = ()
    """train/mfu of each logged line, if the device's peak is known"""
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    sessions: tuple[Session, ...] = ()
    """sum to total_seconds; empty in checkpoints older than this field"""
    files: dict[RelativePath, FileRecord] = {}


class Snapshot:
    """A checkpoint in host memory: weights and moments by name, and the training state."""

    def __init__(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        self.state, self.tensors = state, tensors


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def write_checkpoint(root: Path, snapshot: Snapshot, config: ModelConfig) -> Path:
    """Write one checkpoint below `root`, atomically; returns its folder.

    Raises:
        UserError: no space is left; existing checkpoints are unchanged.
    """
    final = root / folder_name(snapshot.state.step)
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights = {name: tensor for name, tensor in snapshot.tensors.items() if "/" not in name}
        moments = {name: tensor for name, tensor in snapshot.tensors.items() if "/" in name}
        hashes = {
            WEIGHTS: write_tensors(temporary / WEIGHTS, hf_layout(weights, config)),
            OPTIMIZER: write_tensors(temporary / OPTIMIZER, moments),
        }
        write_model_config(temporary, config)
        hashes[MODEL_CONFIG] = sha256_file(temporary / MODEL_CONFIG)
        files = {
            name: FileRecord(size=(temporary / name).stat().st_size, sha256=digest) for name, digest in hashes.items()
        }
        write_model(temporary / STATE, snapshot.state.model_copy(update={"files": files}))
        _remove(final)  # of the same step: damaged, or older than a rollback
        temporary.rename(final)
        fsync_dir(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _remove(folder: Path) -> None:
    """Delete a checkpoint: rename it first, so that it disappears atomically."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.tmp-old")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def read_state(folder: Path, names: Collection[str] | None = None) -> TrainState:
    """The training state, after verifying size and sha256 of all files, or of those in `names`.

    Raises:
        UserError: a file is missing or has changed.
    """
    try:
        state = read_model(folder / STATE, TrainState)
    except FileNotFoundError:
        raise UserError(f"{folder / STATE} is missing") from None
    for name, written in state.files.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing")
        if (size := path.stat().st_size) != written.size:
            raise UserError(f"{path}: {size:,} bytes, {STATE} says {written.size:,}")
        if sha256_file(path) != written.sha256:
            raise UserError(f"{path}: its sha256 is not the one in {STATE}")
    return state


def read_checkpoint(folder: Path, config: ModelConfig) -> Snapshot:
    """Read and verify a checkpoint.

    Raises:
        UserError: it is damaged, or has another architecture.
    """
    state = read_state(folder)
    if (stored := read_hf_config(folder / MODEL_CONFIG)) != config:
        raise UserError(f"{folder} has another architecture: {stored}, expected {config}")
    weights = from_hf_layout(read_tensors(folder / WEIGHTS), config)
    return Snapshot(state, weights | read_tensors(folder / OPTIMIZER))


def checkpoints(root: Path) -> list[Path]:
    """Folders of the checkpoints below `root`, oldest step first."""
    return sorted((path for path in root.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def latest(root: Path, config: ModelConfig, say: Callable[[str], None] = print) -> Snapshot | None:
    """The newest readable checkpoint; skips damaged ones with a warning. None if there are no checkpoints.

    Raises:
        UserError: no checkpoint is readable, or another version wrote the newest.
    """
    folders = checkpoints(root)
    problem = ""
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder, config)
        except OtherVersion:
            raise  # not damaged: resuming from an older one would delete it
        except UserError as error:
            problem = str(error)
            say(f"warning: checkpoint {folder.name} cannot be used: {error}; trying the one before")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints below {root} can be used (the oldest: {problem}): "
            f"delete {root} to train from the start"
        )
    return None


class Checkpoints:
    """Writes a run's checkpoints in a background thread, one at a time, and deletes old ones."""

    def __init__(self, root: Path, model: ModelConfig, config: CheckpointConfig) -> None:
        self.root, self.model, self.config = root, model, config
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def clean(self) -> None:
        """Delete incomplete checkpoints of a killed process."""
        for left in self.root.glob(".step_*.tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    def newest_step(self) -> int | None:
        folders = checkpoints(self.root)
        return _step(folders[-1]) if folders else None

    def save(self, snapshot: Snapshot) -> None:
        """Start writing; the snapshot must not change until the next `wait`.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self.wait()
        self._writing = self._pool.submit(self._write, snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        write_checkpoint(self.root, snapshot, self.model)
        self.prune()

    def wait(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
            UserError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise the thread's error if it has ended; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def prune(self) -> None:
        """Delete all but the newest keep_last checkpoints and those at multiples of keep_every."""
        every = self.config.keep_every
        for folder in checkpoints(self.root)[: -self.config.keep_last]:
            if not (every and _step(folder) % every == 0):
                _remove(folder)

    def delete_after(self, step: int) -> None:
        """Delete checkpoints of later steps, which are damaged or were rolled back."""
        self.wait()
        for folder in checkpoints(self.root):
            if _step(folder) > step:
                _remove(folder)
