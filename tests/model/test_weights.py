"""Weights that other programs read and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2.architecture import hf_config, read_hf_config
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.model.checkpoint import load_model, save_model
from gpt2.model.gpt import GPT
from gpt2.model.weights import load_hf, to_hf

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=130)


@pytest.fixture
def model() -> GPT:
    gpt = GPT(TINY)
    gpt.init_weights(1)
    return gpt


def test_transformers_reads_our_folder(model: GPT, tmp_path: Path) -> None:
    """Bug: names, layout, padding or metadata that from_pretrained does not take, or takes for something else."""
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, model)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    idx = torch.arange(8)[None]
    logits = model(idx)[0]
    assert logits is not None
    torch.testing.assert_close(theirs(idx).logits, logits, atol=1e-5, rtol=1e-5)


def test_we_read_transformers_folder(tmp_path: Path) -> None:
    """Bug: a folder written by save_pretrained is refused or read wrongly."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=130)
    ).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    idx = torch.arange(8)[None]
    logits = model(idx)[0]
    assert logits is not None
    torch.testing.assert_close(theirs(idx).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", 1e-2),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("n_inner", 32),
        ("activation_function", "relu"),
    ],
)
def test_variants_that_compute_otherwise_are_refused(tmp_path: Path, field: str, value: object) -> None:
    """Bug: a GPT-2 that scales its attention otherwise, or has a head of its own, loads and gives wrong figures."""
    plain = hf_config(TINY)
    (tmp_path / "config.json").write_text(json.dumps(plain | {field: value}))
    with pytest.raises(UserError, match=f"{field} {value!r}"):
        read_hf_config(tmp_path / "config.json")
    harmless = {"reorder_and_upcast_attn": True, "n_inner": 64, "scale_attn_weights": True}
    for same in (plain | harmless, plain | {"n_inner": None}, {k: v for k, v in plain.items() if k != field}):
        (tmp_path / "config.json").write_text(json.dumps(same))
        assert read_hf_config(tmp_path / "config.json") == TINY


def test_a_head_of_its_own_is_refused(model: GPT) -> None:
    """Bug: an untied lm_head.weight is dropped without a word, whatever the configuration says."""
    weights = {name: tensor.clone() for name, tensor in to_hf(model).items()}
    head = weights["transformer.wte.weight"].clone()
    load_hf(GPT(TINY), weights | {"lm_head.weight": head})
    head[3, 3] += 1
    for other in (head, head[:-1]):
        with pytest.raises(UserError, match=r"lm_head\.weight is not transformer\.wte\.weight"):
            load_hf(GPT(TINY), weights | {"lm_head.weight": other})


def test_round_trip_is_exact_and_old_files_load(model: GPT, tmp_path: Path) -> None:
    """Bug: OpenAI's published file has no prefix, and holds causal masks and no lm_head."""
    save_model(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(old, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_wrong_weights_are_refused(model: GPT, tmp_path: Path) -> None:
    """Bug: half-loaded models that train on from random numbers."""
    weights = dict(to_hf(model))
    with pytest.raises(UserError, match=r"lack transformer\.ln_f\.bias"):
        load_hf(model, {name: t for name, t in weights.items() if name != "transformer.ln_f.bias"})
    with pytest.raises(UserError, match=r"does not have: transformer\.extra"):
        load_hf(model, weights | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"\(8, 17\).*\(8, 16\)"):
        load_hf(model, weights | {"transformer.wpe.weight": torch.zeros(8, 17)})
    save_model(tmp_path, model)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama'"):
        load_model(tmp_path)
