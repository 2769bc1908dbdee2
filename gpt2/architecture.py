"""Reads the architecture of a stored model from a Hugging Face config.json or a llm.c header, without its weights.

Planning compares it with the recipe before anything runs, so this module does not import torch.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gpt2.config.train import LAYER_NORM_EPS, ModelConfig
from gpt2.errors import UserError
from gpt2.stage.facts import PretrainedFacts, TrainFacts
from gpt2.stage.manifest import MANIFEST, Manifest, read_model

MODEL_CONFIG = "config.json"
FIXED = {
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
"""Fields of config.json with one supported value, which is also Hugging Face's default. `reorder_and_upcast_attn` is
not among them, as it only changes rounding."""

LLMC_MAGIC = 20240326
LLMC_HEADER_BYTES = 256 * 4
LLMC_DTYPES = {3: "float32", 5: "bfloat16"}
"""by version"""


def resolve(path: Path) -> Path:
    """The checkpoint folder or llm.c file of `path`.

    Raises:
        UserError: the path does not exist or contains no model.
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


def read_architecture(path: Path) -> ModelConfig:
    """The architecture of the model at `path`; see `resolve` for the formats.

    Raises:
        UserError: there is no model, or a variant of GPT-2 that is not supported.
    """
    path = resolve(path)
    return read_llmc_header(path).config if path.is_file() else read_hf_config(path / MODEL_CONFIG)


def check_architecture(path: str, wanted: ModelConfig) -> None:
    """Compare the model at `path`, which train.init_from names, with train.model.

    Raises:
        UserError: a field differs; weights of another number of heads have the same shapes and compute something else.
    """
    found = read_architecture(Path(path).expanduser())
    differ = [name for name in ModelConfig.model_fields if getattr(found, name) != getattr(wanted, name)]
    if differ:
        both = ", ".join(f"{name} {getattr(found, name)} there and {getattr(wanted, name)} here" for name in differ)
        fields = " ".join(f"train.model.{name}={getattr(found, name)}" for name in differ)
        raise UserError(f"train.init_from: {path} has another architecture than train.model: {both}; set {fields}")


# ------------------------------------------------------------------------------------------------------- config.json


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a GPT2LMHeadModel with this architecture."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": config.vocab_size - 1,  # <|endoftext|> is GPT-2's last token
        "eos_token_id": config.vocab_size - 1,
        "tie_word_embeddings": True,
    }


def read_hf_config(path: Path) -> ModelConfig:
    """The architecture that a Hugging Face config.json describes.

    Raises:
        UserError: the file is missing, or describes another model or an unsupported variant of GPT-2.
    """
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a model folder holds config.json and model.safetensors") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("model_type") != "gpt2":
        kind = fields.get("model_type") if isinstance(fields, dict) else type(fields).__name__
        raise UserError(f"{path} describes a {kind!r} model: only 'gpt2' can be loaded")
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"{path} has activation_function {activation!r}: GPT-2's is 'gelu_new'")
    for name, only in FIXED.items():
        if (value := fields.get(name, only)) != only:
            raise UserError(f"{path} has {name} {value!r}: GPT-2's is {only!r}, and only that is computed here")
    try:
        config = ModelConfig(
            n_layer=fields["n_layer"],
            n_head=fields["n_head"],
            n_embd=fields["n_embd"],
            block_size=fields["n_positions"] if "n_positions" in fields else fields.get("n_ctx", 1024),
            vocab_size=fields["vocab_size"],
        )
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}: copy the file again") from error
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise UserError(f"{path}: {where}: {detail['msg']} (given: {detail['input']!r})") from error
    if (inner := fields.get("n_inner")) not in (None, 4 * config.n_embd):
        raise UserError(f"{path} has n_inner {inner!r}: GPT-2's is 4 * n_embd, {4 * config.n_embd}")
    return config


# ------------------------------------------------------------------------------------------------------------- llm.c


class LlmcHeader(NamedTuple):
    config: ModelConfig
    version: int
    padded_vocab_size: int


def is_llmc(path: Path) -> bool:
    """Whether `path` is a file with the magic number of llm.c's model checkpoints."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == LLMC_MAGIC.to_bytes(4, "little")


def read_llmc_header(path: Path) -> LlmcHeader:
    """The header of a llm.c model checkpoint.

    Raises:
        UserError: no such file, another format or version, or inconsistent sizes.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(LLMC_HEADER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    if len(raw) < LLMC_HEADER_BYTES:
        raise UserError(f"{path} holds {len(raw):,} bytes, a llm.c checkpoint begins with {LLMC_HEADER_BYTES:,}")
    magic, version, block_size, vocab_size, n_layer, n_head, n_embd, padded = struct.unpack("<8i", raw[:32])
    if magic != LLMC_MAGIC:
        raise UserError(f"{path} begins with {magic}, a llm.c model checkpoint with {LLMC_MAGIC}: it is something else")
    if version not in LLMC_DTYPES:
        raise UserError(
            f"{path} is version {version}: known are 3 (fp32) and 5 (bf16); write it again with today's llm.c"
        )
    if padded < vocab_size or min(block_size, vocab_size, n_layer, n_head, n_embd) < 1 or n_embd % n_head:
        raise UserError(
            f"{path} has a header that contradicts itself: context {block_size}, vocabulary {vocab_size} padded to "
            f"{padded}, {n_layer} layers, {n_head} heads, width {n_embd}; copy it again, or write it again"
        )
    config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size)
    return LlmcHeader(config, version, padded)
