"""Conversion between GPT's weights and Hugging Face's GPT2LMHeadModel. The names are the same.

Hugging Face stores a block's four matrices as (in, out), GPT as (out, in); GPT pads wte's vocab_size rows with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.model.gpt import GPT

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def to_hf(model: GPT) -> dict[str, Tensor]:
    """The weights in GPT2LMHeadModel's layout, without the tied lm_head; views where possible."""
    return hf_layout({name: parameter.detach() for name, parameter in model.named_parameters()}, model.config)


def hf_layout(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors with the shapes of GPT's parameters (weights or optimizer state) in Hugging Face's layout."""
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
    """The inverse of `hf_layout`: (out, in) matrices, and wte padded with zeros."""
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
    """Copy Hugging Face weights into `model`; the prefix "transformer." is optional, causal masks are ignored.

    Raises:
        UserError: a tensor is missing, unknown or has another shape, or the head differs from the token embedding.
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
        raise UserError(
            f"{HEAD} is not {WTE}: GPT-2's head is tied to its token embedding, an untied head is not supported"
        )
    model.transformer.wte.weight.zero_()  # the padded rows stay zero
    for name, ours in wanted.items():
        ours.copy_(given[name])


def _full_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
