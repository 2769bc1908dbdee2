"""What is read of a store is what was written to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_evaluation import evaluation, tiny_model, trained, words_everywhere  # noqa: F401
from tiny_run import CONFIG, make_shards

from gpt2.config.train import TrainConfig
from gpt2.distributed import SINGLE_PROCESS
from gpt2.download.sources import weight_files, weights_sha256
from gpt2.errors import UserError
from gpt2.evaluate.stage import main, work
from gpt2.export.hf import export_hf
from gpt2.model.checkpoint import Snapshot, TrainState, save_model, write_checkpoint
from gpt2.model.load import load_any, load_init
from gpt2.stage.directory import StageDir
from gpt2.stage.file_hashes import sha256_file
from gpt2.stage.manifest import MANIFEST, Manifest, read_model, write_model
from gpt2.train.build import initial_snapshot


def flip(path: Path) -> None:
    """Change one byte in the middle as a disk does: size and mtime stay, and the manifest sees no other stamp."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for directory in path.parents[:3]:
        if (directory / MANIFEST).exists():
            manifest, now = read_model(directory / MANIFEST, Manifest), path.stat()
            files = tuple(
                entry.model_copy(update={"inode": now.st_ino, "ctime_ns": now.st_ctime_ns})
                if directory / entry.path == path
                else entry
                for entry in manifest.files
            )
            write_model(directory / MANIFEST, manifest.model_copy(update={"files": files}))
            assert not StageDir(directory).manifest.problems(directory)  # type: ignore[union-attr]


def checkpoint_of_ours(tmp_path: Path) -> Path:
    """One that no manifest lists yet."""
    model = tiny_model()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moments = {f"{name}/exp_avg": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return write_checkpoint(tmp_path, Snapshot(TrainState(step=3, evaluated=True), tensors | moments), model.config)


def finished_training(tmp_path: Path) -> Path:
    return tmp_path / trained(tmp_path, make_shards(tmp_path), tiny_model()).address / "checkpoints/step_00000001"


@pytest.mark.parametrize("make", [checkpoint_of_ours, finished_training])
@pytest.mark.parametrize("use", [load_any, lambda folder: export_hf(folder, folder.parent / "out")])
def test_weights_with_a_flipped_byte_are_refused(
    tmp_path: Path, make: Callable[[Path], Path], use: Callable[[Path], object]
) -> None:
    """Catches: damaged weights sampled, exported or evaluated without a word."""
    folder = make(tmp_path)
    load_any(folder)
    flip(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: its sha256 is not"):
        use(folder)
    assert not (folder.parent / "out").exists()


def test_moments_are_not_read_to_check_weights(tmp_path: Path) -> None:
    """Catches: twice the weights' size hashed in vain for each sample."""
    folder = checkpoint_of_ours(tmp_path)
    (folder / "optimizer.safetensors").unlink()
    load_any(folder)


def test_evaluation_refuses_a_shard_with_a_flipped_byte(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches: a validation loss of other tokens, as the stage and alone."""
    directory = evaluation(tmp_path)
    stage = StageDir(directory)
    shard = next((stage.input("shards").path / "shards").glob("*_val_*"))
    flip(shard)
    with pytest.raises(UserError, match=rf"{shard.name}: its sha256 is not the manifest's"):
        work(stage, SINGLE_PROCESS)
    folder = next(stage.input("model").path.glob("checkpoints/*"))
    assert main(["--folder", str(folder), "--shards", str(shard), "--device", "cpu"]) == 2
    assert f"{shard.name}: its sha256 is not the manifest's" in capfd.readouterr().err


def test_evaluation_refuses_a_benchmark_with_a_flipped_byte(tmp_path: Path) -> None:
    directory = evaluation(tmp_path)
    flip(StageDir(directory).input("benchmark:held-out").path / "examples.npz")
    with pytest.raises(UserError, match=r"examples\.npz: its sha256 is not the manifest's"):
        work(StageDir(directory), SINGLE_PROCESS)


def test_training_begins_from_the_planned_weights_alone(tmp_path: Path) -> None:
    """Catches: weights replaced between plan and training, trained on under the address of the first."""
    model = tiny_model()
    save_model(tmp_path / "start", model)
    files = weight_files(str(tmp_path / "start"))
    planned = weights_sha256(files, [sha256_file(file) for file in files])
    other = tiny_model()
    load_init(other, str(tmp_path / "start"), planned)
    with torch.no_grad():
        other.transformer.ln_f.bias += 1
    save_model(tmp_path / "start", other)
    with pytest.raises(UserError, match=f"sha256 {planned} then, [0-9a-f]{{64}} now"):
        load_init(other, str(tmp_path / "start"), planned)
    config = TrainConfig.model_validate(
        CONFIG | {"model": model.config, "total_batch_size": 128, "init_from": str(tmp_path / "start")}
    )
    initial_snapshot(config)
    with pytest.raises(UserError, match=f"sha256 {planned} then, [0-9a-f]{{64}} now"):
        initial_snapshot(config.model_copy(update={"init_sha256": planned}))


def test_training_does_not_begin_from_other_heads(tmp_path: Path) -> None:
    """Catches: attention divided otherwise than the weights were trained with; all shapes are the same."""
    model = tiny_model()
    save_model(tmp_path / "start", model)
    config = model.config.model_copy(update={"n_head": 4})
    with pytest.raises(UserError, match="n_head 2 there and 4 here"):
        load_init(type(model)(config), str(tmp_path / "start"))
