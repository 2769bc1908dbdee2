"""llm.c's checkpoint format: bytes where llm.c looks for them, round trips, and files that are not right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.architecture import is_llmc
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.model.gpt import GPT
from gpt2.model.llmc import read_llmc, write_llmc
from gpt2.model.load import load_any
from gpt2.model.weights import to_hf

CONFIG = ModelConfig(n_layer=3, n_head=2, n_embd=16, block_size=24, vocab_size=203)  # padded to 256
C, L, T, V, VP = 16, 3, 24, 203, 256


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains too, or a swapped pair would go unseen
            parameter.normal_(generator=generator)
    return {name: tensor.clone() for name, tensor in to_hf(model).items()}


def test_every_tensor_lies_where_llmc_reads_it(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Tensors out of order, matrices left as (in, out), layers interleaved, or no padding. The layout is written down
    here a second time, from llm.c's C side: sizes in order, one after the other."""
    write_llmc(tmp_path / "m.bin", CONFIG, weights)
    raw = (tmp_path / "m.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:8].tolist() == [20240326, 3, T, V, L, 2, C, VP]
    assert not header[8:].any()
    values = np.frombuffer(raw[1024:], "<f4")
    at = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape)

    def hf(name: str) -> np.ndarray:
        return weights[f"transformer.{name}"].numpy()

    wte = take(VP, C)
    assert np.array_equal(wte[:V], hf("wte.weight"))
    assert not wte[V:].any()
    assert np.array_equal(take(T, C), hf("wpe.weight"))
    for name, shape in [
        ("ln_1.weight", (C,)),
        ("ln_1.bias", (C,)),
        ("attn.c_attn.weight", (3 * C, C)),
        ("attn.c_attn.bias", (3 * C,)),
        ("attn.c_proj.weight", (C, C)),
        ("attn.c_proj.bias", (C,)),
        ("ln_2.weight", (C,)),
        ("ln_2.bias", (C,)),
        ("mlp.c_fc.weight", (4 * C, C)),
        ("mlp.c_fc.bias", (4 * C,)),
        ("mlp.c_proj.weight", (C, 4 * C)),
        ("mlp.c_proj.bias", (C,)),
    ]:
        stacked = take(L, *shape)
        for layer in range(L):
            theirs = hf(f"h.{layer}.{name}")
            assert np.array_equal(stacked[layer], theirs.T if len(shape) == 2 else theirs), (name, layer)
    assert np.array_equal(take(C), hf("ln_f.weight"))
    assert np.array_equal(take(C), hf("ln_f.bias"))
    assert at == len(values)


def test_fp32_loses_no_bit(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    write_llmc(tmp_path / "a.bin", CONFIG, weights)
    config, read = read_llmc(tmp_path / "a.bin")
    assert config == CONFIG
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    write_llmc(tmp_path / "b.bin", config, read)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_bf16_rounds_once_to_nearest(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Truncating instead of rounding, or another rounding at each trip."""
    write_llmc(tmp_path / "a.bin", CONFIG, weights, version=5)
    config, read = read_llmc(tmp_path / "a.bin")
    assert all(torch.equal(read[name], weights[name].bfloat16().float()) for name in weights)
    write_llmc(tmp_path / "b.bin", config, read, version=5)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_a_transformers_model_through_llmc_gives_the_same_logits(tmp_path: Path) -> None:
    """Heads, halves of c_attn or layers that change places on the way."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(n_layer=L, n_head=2, n_embd=C, n_positions=T, vocab_size=V, bos_token_id=1, eos_token_id=1)
    ).eval()
    write_llmc(tmp_path / "m.bin", CONFIG, theirs.state_dict())
    idx = torch.randint(0, V, (2, T))
    with torch.no_grad():
        logits, _ = load_any(tmp_path / "m.bin")(idx)
        torch.testing.assert_close(logits, theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_files_that_are_not_right(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Garbage read as weights."""
    write_llmc(tmp_path / "m.bin", CONFIG, weights)
    raw = (tmp_path / "m.bin").read_bytes()
    bad = tmp_path / "bad.bin"

    def refused(data: bytes, message: str) -> None:
        bad.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_llmc(bad)

    def with_header(index: int, value: int) -> bytes:
        return raw[: 4 * index] + value.to_bytes(4, "little") + raw[4 * index + 4 :]

    refused(raw[:-4], f"holds {len(raw) - 4:,} bytes, its header asks for {len(raw):,}")
    refused(raw + b"\0", f"holds {len(raw) + 1:,} bytes")
    refused(raw[:100], "holds 100 bytes")
    refused(with_header(0, 20240520), "begins with 20240520, a llm.c model checkpoint with 20240326")
    refused(with_header(1, 2), "version 2: known are 3")
    refused(with_header(7, 100), "contradicts itself: .* vocabulary 203 padded to 100")
    refused(with_header(5, 3), "3 heads, width 16")
    with pytest.raises(UserError, match="no such file"):
        read_llmc(tmp_path / "none.bin")
    assert is_llmc(tmp_path / "m.bin")
    assert not is_llmc(tmp_path)
