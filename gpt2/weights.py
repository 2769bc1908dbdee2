"""Between our weights and other people's: Hugging Face's GPT2LMHeadModel and llm.c's checkpoint files.

Hugging Face stores the four matrices of a block as (in, out), we as (out, in); it has vocab_size rows of wte, we
pad them with zeros; the names are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.config import ModelConfig
from gpt2.errors import UserError
from gpt2.model import GPT, LAYER_NORM_EPS

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
FIXED = {
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
"""What config.json may say in one way only: the model computes so, whatever the file asks for. These are also Hugging
Face's defaults. `reorder_and_upcast_attn` is not among them, as it only changes the rounding."""


def to_hf(model: GPT) -> dict[str, Tensor]:
    """The weights as GPT2LMHeadModel names and lays them out, without the tied lm_head; views where possible."""
    return hf_layout({name: parameter.detach() for name, parameter in model.named_parameters()}, model.config)


def hf_layout(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Anything of the shape of our parameters (weights, their optimizer state) in Hugging Face's layout."""
    theirs = {}
    for name, tensor in ours.items():
        if name.endswith(TRANSPOSED):
            theirs[name] = tensor.t()  # (out, in) -> (in, out)
        elif name == WTE:
            theirs[name] = tensor[: config.vocab_size]
        else:
            theirs[name] = tensor
    return theirs


def from_hf_layout(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The way back from `hf_layout`: (out, in) matrices, and the padded rows of wte as zeros."""
    ours = {}
    for name, tensor in theirs.items():
        if name.endswith(TRANSPOSED):
            ours[name] = tensor.t()
        elif name == WTE:
            ours[name] = tensor.new_zeros(config.padded_vocab_size, tensor.size(1))
            ours[name][: config.vocab_size] = tensor
        else:
            ours[name] = tensor
    return ours


@torch.no_grad()
def load_hf(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Copy Hugging Face weights into `model`; with or without the prefix "transformer.", causal masks left out.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or the head is not the token embedding.
    """
    given = {_full_name(name): tensor for name, tensor in weights.items()}
    given = {name: tensor for name, tensor in given.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    head = given.pop(HEAD, None)
    wanted = to_hf(model)
    if missing := wanted.keys() - given.keys():
        raise UserError(f"the weights lack {', '.join(sorted(missing)[:3])} ({len(missing)} of {len(wanted)} tensors)")
    if unknown := given.keys() - wanted.keys():
        raise UserError(f"the weights hold tensors that GPT-2 does not have: {', '.join(sorted(unknown)[:3])}")
    for name, ours in wanted.items():
        if ours.shape != given[name].shape:
            raise UserError(
                f"{name} is {tuple(given[name].shape)} in the weights and {tuple(ours.shape)} in the model: "
                f"use the configuration that they were trained with"
            )
    if head is not None and (head.shape != given[WTE].shape or not torch.equal(head, given[WTE].to(head))):
        raise UserError(f"{HEAD} is not {WTE}: GPT-2's head is its token embedding, a head of its own would be lost")
    model.transformer.wte.weight.zero_()  # the padded rows stay so
    for name, ours in wanted.items():
        ours.copy_(given[name])


def _full_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


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
        UserError: it is missing, or describes something else than GPT-2, also a variant that computes otherwise.
    """
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a model folder holds config.json beside model.safetensors") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if fields.get("model_type") != "gpt2":
        raise UserError(f"{path} describes a {fields.get('model_type')!r} model: only 'gpt2' can be loaded")
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"{path} has activation_function {activation!r}: GPT-2's is 'gelu_new'")
    for name, only in FIXED.items():
        if (value := fields.get(name, only)) != only:
            raise UserError(f"{path} has {name} {value!r}: GPT-2's is {only!r}, and only that is computed here")
    if (inner := fields.get("n_inner")) not in (None, 4 * fields["n_embd"]):
        raise UserError(f"{path} has n_inner {inner!r}: GPT-2's is 4 * n_embd, {4 * fields['n_embd']}")
    return ModelConfig(
        n_layer=fields["n_layer"],
        n_head=fields["n_head"],
        n_embd=fields["n_embd"],
        block_size=fields.get("n_positions", fields.get("n_ctx", 1024)),
        vocab_size=fields["vocab_size"],
    )
