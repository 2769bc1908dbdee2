"""The learning rate of each step and the update that AdamW makes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gpt2.config.train import OptimConfig
from gpt2.model.gpt import GPT, ModelConfig
from gpt2.train.optim import build_optimizer, learning_rate, parameter_groups

RECIPE = OptimConfig(max_lr=6e-4)  # GPT-2 124M: 700 warm-up steps, cosine to 0
STEPS = 19_560


def test_the_recipes_schedule() -> None:
    """Bug: a warm-up that starts at 0, a cosine over all steps instead of the remaining ones, a wrong end."""
    assert learning_rate(RECIPE, STEPS, 0) == pytest.approx(6e-4 / 700)
    assert learning_rate(RECIPE, STEPS, 699) == pytest.approx(6e-4)
    assert learning_rate(RECIPE, STEPS, 700) == 6e-4
    assert learning_rate(RECIPE, STEPS, 700 + (STEPS - 700) // 2) == pytest.approx(3e-4)
    assert learning_rate(RECIPE, STEPS, STEPS - 1) == pytest.approx(
        6e-4 * 0.5 * (1 + math.cos(math.pi * (1 - 1 / (STEPS - 700))))
    )
    floor = RECIPE.model_copy(update={"min_lr": 6e-5})
    assert learning_rate(floor, STEPS, STEPS) == pytest.approx(6e-5)


def test_warmup_stable_decay() -> None:
    """Bug: a decay that begins at the wrong step, jumps, or overlaps the warm-up."""
    config = OptimConfig(max_lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.25)
    rates = [learning_rate(config, 100, step) for step in range(100)]
    assert rates[9:76] == [1.0] * 67
    assert rates[76] == pytest.approx(0.96) and rates[99] == pytest.approx(0.04)
    assert sorted(rates[75:], reverse=True) == rates[75:]
    whole = config.model_copy(update={"decay_fraction": 1.0})
    assert learning_rate(whole, 100, 10) == 1.0
    assert learning_rate(config.model_copy(update={"decay_fraction": 0.0}), 100, 99) == 1.0


def test_what_is_decayed() -> None:
    """Bug: biases or LayerNorm decayed, or the embeddings left out (llm.c decays both of them)."""
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=9))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = parameter_groups(model.parameters(), RECIPE)
    assert isinstance(decayed["params"], list) and isinstance(others["params"], list)
    assert {names[id(p)].removeprefix("transformer.") for p in decayed["params"]} == {
        "wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
    }  # fmt: skip
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_the_update_is_adamws() -> None:
    """Bug: state made by hand that changes the first steps (bias correction), L2 decay instead of decoupled."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 7))
    expected = parameter.detach().double().clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    optimizer = build_optimizer([parameter], RECIPE)
    for t in range(1, 6):
        gradient = torch.randn(5, 7)
        parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * t
        optimizer.step()
        # Loshchilov and Hutter, algorithm 2, written out
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.95 * v + 0.05 * gradient.double() ** 2
        expected -= 0.01 * t * 0.1 * expected
        expected -= 0.01 * t * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=1e-5)
