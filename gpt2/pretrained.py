"""GPT-2 weights from wherever they lie: a checkpoint of ours, a Hugging Face folder, a llm.c file, a finished training.

For sampling, exporting and evaluating any model, and for training that goes on from one (`train.init_from`).
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from gpt2.checkpoint import MODEL_CONFIG, WEIGHTS
from gpt2.config import ModelConfig
from gpt2.errors import UserError
from gpt2.llmc import is_llmc, read_llmc
from gpt2.manifest import MANIFEST, Manifest, PretrainedFacts, RelativePath, TrainFacts, read_model
from gpt2.model import GPT
from gpt2.tensor_file import read_tensors
from gpt2.weights import load_hf, read_hf_config

SHARDED, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"


def pick_device(name: str) -> torch.device:
    """The device that a command line's --device names; "auto": the GPU where there is one.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch finds no GPU here; leave the option away, or give cpu")
        if name != "cuda":  # torchrun's processes each take another one
            torch.empty(0, device=device)  # the one question that every kind of device answers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()
        raise UserError(f"--device {name} cannot be used: {why[0] if why else 'torch does not say why'}") from error
    return device


def load_any(path: Path, device: torch.device | str = "cpu") -> GPT:
    """The model at `path`, in fp32 and evaluation mode; see `read_any` for what may lie there."""
    config, weights = read_any(path)
    model = GPT(config)
    load_hf(model, weights)
    return model.to(device).eval()


def load_init(path: str | Path) -> dict[str, Tensor]:
    """The weights at `path` by Hugging Face's names, in its layout, on the CPU; `gpt2.weights.load_hf` puts them into a
    model and says where their shapes are not the model's."""
    return read_any(Path(path).expanduser())[1]


def read_any(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Architecture and weights of a GPT-2.

    Args:
        path: a checkpoint folder of ours; a Hugging Face folder, with model.safetensors in one file or several or
            pytorch_model.bin; a llm.c file, or a folder that holds just one; the directory of a finished stage that has
            a model: a training, whose final checkpoint is meant, or fetched weights.

    Raises:
        UserError: none of these, or damaged.
    """
    path = resolve(path)
    if path.is_file():
        return read_llmc(path)
    return read_hf_config(path / MODEL_CONFIG), _read_folder(path)


def resolve(path: Path) -> Path:
    """The checkpoint folder or llm.c file that `path` stands for.

    Raises:
        UserError: there is nothing, or it holds no model.
    """
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; give a checkpoint folder, a Hugging Face folder or a llm.c file"
        )
    if path.is_file() or (path / MODEL_CONFIG).exists():
        return path
    if (path / MANIFEST).exists():
        facts = read_model(path / MANIFEST, Manifest).facts
        if isinstance(facts, TrainFacts | PretrainedFacts):
            return path / facts.checkpoint
    found = [file for file in sorted(path.glob("*.bin")) if is_llmc(file)]
    if len(found) == 1:
        return found[0]
    what = (
        f"{len(found)} llm.c checkpoints: name one of them" if found else f"no {MODEL_CONFIG} and no llm.c checkpoint"
    )
    steps = sorted(path.glob("checkpoints/step_*")) or sorted(path.glob("step_*"))
    hint = f"; the newest checkpoint there is {steps[-1]}" if steps else ""
    raise UserError(f"{path} holds {what}{hint}")


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
        try:  # weights_only: a pickle from elsewhere must not run code
            return torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{folder / PICKLED} is damaged, or more than weights: {str(error).splitlines()[0]}"
            ) from error
    raise UserError(f"{folder} has a {MODEL_CONFIG} but no {WEIGHTS}: copy the weights beside it")
