"""Checkpoints: plain safetensors and JSON, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.atomic import write_text
from gpt2.config import ModelConfig
from gpt2.errors import UserError
from gpt2.model import GPT
from gpt2.weights import hf_config, load_hf, read_hf_config, to_hf

WEIGHTS, MODEL_CONFIG = "model.safetensors", "config.json"


def load_model(folder: Path, device: torch.device | str = "cpu") -> GPT:
    """Read a model from one of our checkpoints or from a Hugging Face GPT-2 folder; fp32, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, or it is not a GPT-2.
    """
    model = GPT(read_hf_config(folder / MODEL_CONFIG))
    load_hf(model, read_tensors(folder / WEIGHTS))
    return model.to(device).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete its folder and run again") from error


def save_model(folder: Path, model: GPT) -> None:
    """Write model.safetensors and config.json as transformers' GPT2LMHeadModel.from_pretrained reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in to_hf(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_model_config(folder, model.config)


def write_model_config(folder: Path, config: ModelConfig) -> None:
    write_text(folder / MODEL_CONFIG, json.dumps(hf_config(config), indent=2) + "\n")
