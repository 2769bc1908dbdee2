"""Checkpoints: whole or not at all, verified when read, the one before when the newest is damaged."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gpt2.config.train import CheckpointConfig, ModelConfig
from gpt2.errors import UserError
from gpt2.model.checkpoint import (
    Checkpoints,
    Snapshot,
    TrainState,
    checkpoints,
    latest,
    load_model,
    read_checkpoint,
    write_checkpoint,
)
from gpt2.model.gpt import GPT
from gpt2.model.safetensors_file import read_tensors, write_tensors

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=130)


def snapshot(step: int, **state: object) -> Snapshot:
    """Weights and moments that depend on the step."""
    model = GPT(TINY)
    model.init_weights(step)
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    moments = {f"{name}/exp_avg": tensor * 2 for name, tensor in tensors.items()}
    moments |= {f"{name}/step": torch.tensor(float(step)) for name in tensors}
    return Snapshot(TrainState(step=step, evaluated=True, **state), tensors | moments)  # type: ignore[arg-type]


def steps(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoints(root)]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """Bugs: a transposed matrix, padding, a moment under another name, floats that JSON rounds."""
    written = snapshot(7, passed_over=3, losses=(0.1 + 0.2, 1 / 3), train_seconds=1e-9)
    folder = write_checkpoint(tmp_path, written, TINY)
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "optimizer.safetensors", "state.json",
    }  # fmt: skip
    read = read_checkpoint(folder, TINY)
    assert read.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(tensor, written.tensors[name]) for name, tensor in read.tensors.items())
    assert read.state.model_copy(update={"files": {}}) == written.state
    model = load_model(folder)
    assert all(torch.equal(p, written.tensors[name]) for name, p in model.named_parameters())


def test_our_file_is_a_safetensors_file(tmp_path: Path) -> None:
    """Bug: a header that the library, and so everybody else, reads differently."""
    tensors = {
        "matrix": torch.randn(3, 5),
        "turned": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(7).bfloat16(),
        "ids": torch.arange(4),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    for read in (load_file(tmp_path / "x.safetensors"), read_tensors(tmp_path / "x.safetensors")):
        assert read.keys() == tensors.keys()
        assert all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no state", "not json"])
def test_a_damaged_newest_falls_back(tmp_path: Path, damage: str) -> None:
    """Bug: training on from garbage, or giving up though the checkpoint before is good."""
    for step in (5, 10):
        write_checkpoint(tmp_path, snapshot(step), TINY)
    folder = tmp_path / "step_00000010"
    target = folder / ("optimizer.safetensors" if damage in ("cut", "missing") else "model.safetensors")
    data = bytearray(target.read_bytes())
    if damage == "cut":
        target.write_bytes(data[:-100])
    elif damage == "flipped":
        data[-50] ^= 1
        target.write_bytes(data)
    elif damage == "missing":
        target.unlink()
    elif damage == "no state":
        (folder / "state.json").unlink()
    else:
        (folder / "state.json").write_text("{")
    said: list[str] = []
    found = latest(tmp_path, TINY, said.append)
    assert found is not None and found.state.step == 5
    assert len(said) == 1 and "step_00000010" in said[0] and "the one before" in said[0]


def test_all_damaged_is_an_error_and_none_is_a_beginning(tmp_path: Path) -> None:
    """Bug: beginning silently from the start though there were checkpoints."""
    assert latest(tmp_path, TINY) is None
    folder = write_checkpoint(tmp_path, snapshot(5), TINY)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        latest(tmp_path, TINY, lambda text: None)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """Bug: a checkpoint copied from another run fails deep inside a copy of tensors."""
    folder = write_checkpoint(tmp_path, snapshot(5), TINY)
    with pytest.raises(UserError, match=r"n_layer=2.*n_layer=3"):
        read_checkpoint(folder, TINY.model_copy(update={"n_layer": 3}))


def test_what_is_kept(tmp_path: Path) -> None:
    """Bugs: the newest deleted, keep_every ignored, a leftover of a kill taken for a checkpoint."""
    (tmp_path / ".step_00000001.tmp").mkdir()
    saver = Checkpoints(tmp_path, TINY, CheckpointConfig(every=1, keep_last=2, keep_every=4))
    saver.clean()
    for step in range(1, 11):
        saver.save(snapshot(step))
    saver.wait()
    assert steps(tmp_path) == [4, 8, 9, 10]
    assert not list(tmp_path.glob(".*"))
    saver.delete_after(8)
    assert steps(tmp_path) == [4, 8] and saver.newest_step() == 8


def test_a_full_disk_takes_nothing_away(tmp_path: Path) -> None:
    """Bug: the old checkpoint deleted before the new one is whole; a half one left; an error that nobody hears."""
    saver = Checkpoints(tmp_path, TINY, CheckpointConfig(every=1, keep_last=1))
    saver.save(snapshot(1))
    saver.wait()
    with full_disk(20_000):
        saver.save(snapshot(2))
        with pytest.raises(UserError, match="no space left"):
            saver.wait()
    assert steps(tmp_path) == [1] and not list(tmp_path.glob(".*"))
    assert read_checkpoint(tmp_path / "step_00000001", TINY).state.step == 1
    saver.save(snapshot(2))
    saver.wait()
    assert steps(tmp_path) == [2]


def test_writing_again_replaces(tmp_path: Path) -> None:
    """Bug: a step that was saved before, in a course since given up, stops the run with "directory not empty"."""
    write_checkpoint(tmp_path, snapshot(3), TINY)
    write_checkpoint(tmp_path, snapshot(3, passed_over=1), TINY)
    state = json.loads((tmp_path / "step_00000003" / "state.json").read_bytes())
    assert state["passed_over"] == 1 and not list(tmp_path.glob(".*"))
