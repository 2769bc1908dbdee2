"""Loads GPT-2 weights from a checkpoint, a Hugging Face folder, a llm.c file or a finished stage's directory.

Used by sampling, export and evaluation, and by training with `train.init_from`.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from gpt2.architecture import MODEL_CONFIG, check_architecture, read_hf_config, resolve
from gpt2.config.train import ModelConfig
from gpt2.download.sources import weight_files, weights_sha256
from gpt2.errors import UserError
from gpt2.model.checkpoint import STATE, WEIGHTS, read_state
from gpt2.model.gpt import GPT
from gpt2.model.llmc import read_llmc
from gpt2.model.safetensors_file import read_tensors
from gpt2.model.weights import load_hf
from gpt2.stage.facts import RelativePath
from gpt2.stage.file_hashes import Stamp, sha256_file
from gpt2.stage.integrity import check_recorded

SHARDED, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"


def pick_device(name: str) -> torch.device:
    """The device of a command line's --device; "auto" is a GPU if present.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch finds no GPU here; leave the option away, or give cpu")
        if name != "cuda":  # torchrun assigns one to each process
            torch.empty(0, device=device)  # fails if the device does not exist
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()
        raise UserError(f"--device {name} cannot be used: {why[0] if why else 'torch does not say why'}") from error
    return device


def load_any(path: Path, device: torch.device | str = "cpu") -> GPT:
    """The model at `path`, in fp32 and evaluation mode; see `read_any` for the formats."""
    config, weights = read_any(path)
    model = GPT(config)
    load_hf(model, weights)
    return model.to(device).eval()


def load_init(model: GPT, path: str, sha256: str | None = None) -> None:
    """Load the weights of train.init_from into `model`.

    Args:
        sha256: from `gpt2.download.sources.identify_weights` when the run was planned; None skips the comparison.

    Raises:
        UserError: as `read_any`; or another architecture; or the files changed since the run was planned.
    """
    check_architecture(path, model.config)
    files = weight_files(path)
    before = [Stamp.of(file) for file in files]
    if sha256 is not None and (found := weights_sha256(files, [sha256_file(file) for file in files])) != sha256:
        raise UserError(
            f"train.init_from: {path} changed since the run was planned: sha256 {sha256} then, {found} now; "
            "restore the weights, or run the recipe again, which plans it again"
        )
    load_hf(model, read_any(Path(path).expanduser())[1])
    if [Stamp.of(file) for file in files] != before:
        raise UserError(f"train.init_from: {path} changed while it was read: run again")


def read_any(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Architecture and weights of a GPT-2.

    Args:
        path: a checkpoint folder; a Hugging Face folder with model.safetensors, in one file or several, or
            pytorch_model.bin; a llm.c file, or a folder with exactly one; the directory of a finished train stage (its
            final checkpoint) or pretrained stage.

    Raises:
        UserError: none of these, or damaged; verifies the sha256 of files listed in a state.json or a manifest.
    """
    path = resolve(path)
    if path.is_file():
        check_recorded([path])
        return read_llmc(path)
    if (path / STATE).exists():
        read_state(path, (MODEL_CONFIG, WEIGHTS))
    else:
        check_recorded(file for file in sorted(path.iterdir()) if file.is_file())
    return read_hf_config(path / MODEL_CONFIG), _read_folder(path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS)
    if (folder / SHARDED).exists():
        try:
            listed = json.loads((folder / SHARDED).read_bytes())["weight_map"].values()
            files = sorted(TypeAdapter(set[RelativePath]).validate_python(set(listed)))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / SHARDED} is damaged ({error}): copy it again") from error
        return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}
    if (folder / PICKLED).exists():
        try:  # weights_only: an untrusted pickle must not run code
            return torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            # omits torch's text, which explains how to load it anyway
            raise UserError(
                f"{folder / PICKLED} is damaged, or holds more than weights, such as code, and is not loaded: take a "
                f"copy of the model as {WEIGHTS}"
            ) from None
    raise UserError(f"{folder} has a {MODEL_CONFIG} but no {WEIGHTS}: copy the weights into it")
