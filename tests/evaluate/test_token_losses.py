"""Token losses against transformers and torch, with random weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gpt2.config.train import ModelConfig
from gpt2.evaluate.token_losses import CHUNK_TOKENS, autocast, losses_at, token_losses
from gpt2.model.gpt import GPT
from gpt2.model.weights import load_hf

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)


@pytest.fixture(scope="module")
def model() -> GPT:
    gpt = GPT(TINY)
    gpt.init_weights(1)
    with torch.no_grad():  # spread out, so that tokens have different losses
        gpt.transformer.wte.weight[: TINY.vocab_size] *= 20
    return gpt.eval()


def random_batch(seed: int, B: int = 5, T: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    print(f"seed {seed}")
    tokens = torch.randint(0, TINY.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def test_losses_are_transformers_losses() -> None:
    """Would catch: a shift by one position, another softmax, another LayerNorm or head than GPT-2's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, initializer_range=0.4)).eval()
    ours = GPT(TINY).eval()
    load_hf(ours, dict(theirs.state_dict()))
    idx, targets = random_batch(3)
    with torch.no_grad():
        logits = theirs(idx).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    losses = token_losses(ours, idx, targets)
    assert losses.dtype == torch.float32
    assert expected.std() > 0.1  # not all the same: the comparison says something
    torch.testing.assert_close(losses, expected, atol=2e-5, rtol=1e-5)


def test_padding_rows_of_the_vocabulary_take_no_part(model: GPT) -> None:
    """Would catch: a softmax over 50,304 rows, which lowers every probability as soon as the padding is not -inf."""
    idx, targets = random_batch(4)
    before = token_losses(model, idx, targets)
    with torch.no_grad():
        model.transformer.wte.weight[TINY.vocab_size :] = 3.0
    after = token_losses(model, idx, targets)
    with torch.no_grad():
        model.transformer.wte.weight[TINY.vocab_size :] = 0.0
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunk_changes_nothing(model: GPT, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: positions lost or doubled at the seams between chunks of the head."""
    idx, targets = random_batch(5, B=2, T=40)
    whole = token_losses(model, idx, targets)
    monkeypatch.setitem(CHUNK_TOKENS, "cpu", chunk)
    torch.testing.assert_close(token_losses(model, idx, targets), whole, atol=1e-5, rtol=1e-5)


def test_chosen_positions_are_those_of_all_positions(model: GPT) -> None:
    """Would catch: gathering hidden states in another order than the targets."""
    idx, targets = random_batch(6)
    every = token_losses(model, idx, targets)
    positions = torch.randperm(idx.numel(), generator=torch.Generator().manual_seed(7))[:100]
    losses, greedy = losses_at(model, model.hidden(idx), positions, targets.flatten()[positions], greedy=True)
    torch.testing.assert_close(losses, every.flatten()[positions], atol=1e-5, rtol=1e-5)
    assert greedy is not None and greedy.shape == (100,)


def test_greedy_knows_the_likeliest_token(model: GPT) -> None:
    """Would catch: an argmax over padding, or compared with the input instead of the next token."""
    idx, _ = random_batch(8)
    with torch.no_grad():
        logits, _ = model(idx)
    assert logits is not None
    likeliest = logits.argmax(dim=-1).flatten()
    positions = torch.arange(idx.numel())
    _, greedy = losses_at(model, model.hidden(idx), positions, likeliest, greedy=True)
    assert greedy is not None and greedy.all()
    _, greedy = losses_at(model, model.hidden(idx), positions, (likeliest + 1) % TINY.vocab_size, greedy=True)
    assert greedy is not None and not greedy.any()


def test_positions_without_a_target_give_zero(model: GPT) -> None:
    """Would catch: padding that adds to a validation loss."""
    idx, targets = random_batch(9)
    targets[:, 10:] = -1
    losses = token_losses(model, idx, targets)
    assert (losses[:, 10:] == 0).all() and (losses[:, :10] > 0).all()


def test_no_gradient_is_kept(model: GPT) -> None:
    """Would catch: a validation pass that keeps every activation and runs out of memory."""
    idx, targets = random_batch(10)
    assert not token_losses(model, idx, targets).requires_grad


def test_a_precision_that_is_none_is_refused() -> None:
    """Bug: figures in fp32 from a run that was told, in some other word, to work in bf16."""
    with pytest.raises(ValueError, match="neither bf16 nor fp32"):
        autocast(torch.device("cpu"), "bf16, head in fp8")
