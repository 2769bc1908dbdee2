"""The chunked loss on a CPU against the reference model."""

import random

import pytest
import torch

from gpt2.config.train import ModelConfig
from gpt2.kernels.chunked_loss import CHUNK, ChunkedLossGPT
from gpt2.model.gpt import GPT, IGNORE


@pytest.mark.parametrize("T", [5, CHUNK, CHUNK + 1, 3 * CHUNK - 7])
def test_loss_and_gradients_differ_from_the_reference(T: int) -> None:
    """Bugs: positions lost at a chunk border; padded columns in the softmax; unscored targets counted."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=3 * CHUNK, vocab_size=300)).double()
    model.init_weights(seed)
    idx, targets = torch.randint(300, (2, T)), torch.randint(300, (2, T))
    targets[0, ::3] = IGNORE

    _, reference = model(idx, targets)
    (reference * 0.7).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = ChunkedLossGPT(model)(idx, targets)
    (loss * 0.7).backward()

    # the reference computes the loss in fp32 for every model precision
    torch.testing.assert_close(loss.float(), reference.float(), rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not model.transformer.wte.weight.grad[300:].any()


def test_no_scored_target_divides_by_zero() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=10))
    model.init_weights(0)
    loss = ChunkedLossGPT(model)(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), IGNORE))
    assert loss.item() == 0.0
