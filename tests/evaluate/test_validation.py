"""gpt2/validation.py: pinned tokens, the same number whatever the batch and the number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes
from torch.nn import functional as F

from gpt2.config.train import ModelConfig
from gpt2.distributed import SINGLE_PROCESS, World
from gpt2.errors import UserError
from gpt2.evaluate.validation import val_loss
from gpt2.model.gpt import GPT
from gpt2.shards import ShardWriter

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32)


def tiny_model() -> GPT:
    model = GPT(TINY)
    model.init_weights(1)
    with torch.no_grad():
        model.transformer.wte.weight[: TINY.vocab_size] *= 20
    return model


def write_shard(path: Path, tokens: np.ndarray) -> Path:
    with ShardWriter(path) as shard:
        shard.write(tokens)
    return path


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    return np.random.default_rng(11).integers(0, 50257, 2000).astype(np.uint16)


@pytest.fixture(scope="module")
def shard(stream: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard(tmp_path_factory.mktemp("shards") / "x_val_000000.bin", stream)


def by_hand(model: GPT, stream: np.ndarray, tokens: int) -> float:
    """One window after the other, straight from logits: mean loss of stream[1 : tokens + 1]."""
    model.eval()
    total = 0.0
    for start in range(0, tokens, TINY.block_size):
        stop = min(start + TINY.block_size, tokens)
        window = torch.from_numpy(stream[start : stop + 1].astype(np.int64))
        with torch.no_grad():
            logits, _ = model(window[None, :-1])
        assert logits is not None
        total += F.cross_entropy(logits[0].double(), window[1:], reduction="sum").item()
    return total / tokens


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 1024, 1999])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_is_the_mean_over_exactly_those_tokens(
    shard: Path, stream: np.ndarray, tokens: int, micro_batch_size: int
) -> None:
    """Would catch: a lost last window, a token counted twice, a mean of means, padding that counts."""
    model = tiny_model()
    result = val_loss(model, [shard], tokens, micro_batch_size, SINGLE_PROCESS)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(by_hand(model, stream, tokens), abs=2e-6)


def test_a_short_shard_is_used_to_its_end_and_the_caller_told(shard: Path, stream: np.ndarray) -> None:
    """Would catch: dividing by the tokens asked for instead of those there are."""
    model = tiny_model()
    result = val_loss(model, [shard], 10_485_760, 4, SINGLE_PROCESS)
    assert result.tokens == 1999
    assert result.loss == pytest.approx(by_hand(model, stream, 1999), abs=2e-6)


def test_several_shards_are_one_stream(tmp_path: Path, stream: np.ndarray) -> None:
    """Would catch: windows that restart at each shard, or only the first shard being read."""
    parts = [write_shard(tmp_path / f"x_val_00000{i}.bin", part) for i, part in enumerate(np.split(stream, [700, 900]))]
    whole = write_shard(tmp_path / "whole_val_000000.bin", stream)
    assert val_loss(tiny_model(), parts, 1500, 4, SINGLE_PROCESS) == val_loss(
        tiny_model(), [whole], 1500, 4, SINGLE_PROCESS
    )


def test_an_empty_shard_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Would catch: a division by zero, or a loss of 0.0, on a corpus that is too small."""
    empty = write_shard(tmp_path / "x_val_000000.bin", np.array([50256], np.uint16))
    with pytest.raises(UserError, match="hold 1 tokens"):
        val_loss(tiny_model(), [empty], 100, 4, SINGLE_PROCESS)


def test_the_model_stays_as_it_was(shard: Path) -> None:
    """Would catch: training that goes on in evaluation mode, or a gradient left behind."""
    model = tiny_model().train()
    val_loss(model, [shard], 100, 4, SINGLE_PROCESS)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def _losses(world: World, shard: Path) -> list[float]:
    return [val_loss(tiny_model(), [shard], tokens, 3, world).loss for tokens in (50, 1999)]


@pytest.mark.slow
def test_one_and_four_processes_give_the_same_bits(shard: Path) -> None:
    """Would catch: rank 0's loss alone, an average over processes with unequal shares, a hang of a process without
    a batch, and any sum whose order depends on the number of processes."""
    alone = run_processes(1, _losses, shard)
    four = run_processes(4, _losses, shard)
    assert four == alone * 4
