"""How a run is laid out on memory: the arithmetic, the order of preference, and what the user is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt2.config.recipe import load
from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig, TrainConfig
from gpt2.distributed import SINGLE_PROCESS, World
from gpt2.errors import UserError
from gpt2.kernels.head import Fp8Head, Head
from gpt2.train.memory import candidates, estimate_memory, explain_out_of_memory, find_largest, resolve_runtime

A100 = 79.1e9  # bytes free on an 80 GB GPU
RTX = 23.6e9


def gpus(n: int) -> World:
    return World(0, 0, n, torch.device("cuda", 0))


def chosen(recipe: str, n: int, free: float, **runtime: Any) -> tuple[Runtime, str]:
    settings = {"precision": "bf16", **runtime}
    settled, lines = resolve_runtime(load(recipe).train, Runtime(**settings), gpus(n), free)
    return settled, "\n".join(lines)


def test_the_published_settings_come_out() -> None:
    """Bug: the estimate so far off that llm.c's own micro-batch of 64 on 80 GB is not even tried."""
    settled, text = chosen("124m", 8, A100)
    assert (settled.micro_batch_size, settled.sharding, settled.activation_checkpointing) == (64, "ddp", False)
    assert chosen("124m", 1, A100)[0].micro_batch_size == 128  # what the published figure was measured with
    assert "124,439,808 parameters, 8 processes" in text and "ddp: 2.2 GB fixed" in text and "<- chosen" in text


def test_1558m_trains_on_one_gpu() -> None:
    """Bug: fp32 weights, gradients, moments and bf16 copies, 18 bytes a parameter, forgotten or counted twice."""
    settled, text = chosen("1558m", 1, A100)
    assert settled.sharding == "ddp" and "28.0 GB fixed" in text
    assert (settled.micro_batch_size, settled.activation_checkpointing) == (16, False)
    plain, _ = chosen("1558m", 1, A100, kernels="reference")
    assert isinstance(plain.micro_batch_size, int) and plain.micro_batch_size >= 4


@pytest.mark.parametrize(("recipe", "n"), [("350m", 2), ("350m", 8), ("774m", 2), ("774m", 8)])
def test_fsdp_takes_no_more_than_the_estimate(recipe: str, n: int) -> None:
    """Bug: a micro-batch half as large again as there is room for, which is a trial's to refuse, where none is made."""
    config = load(recipe).train
    settled, _ = chosen(recipe, n, A100, sharding="fsdp")
    assert isinstance(settled.micro_batch_size, int)
    way = estimate_memory(config.model, "bf16", n, "fsdp", settled.activation_checkpointing is True)
    assert settled.micro_batch_size <= way.max_sequences(A100 * 0.92)


def test_small_gpus_get_what_fits() -> None:
    """Bugs: recomputing where dealing out the moments is enough; fsdp on one GPU; giving up."""
    assert (chosen("774m", 8, 20e9)[0].sharding, chosen("774m", 8, RTX)[0].sharding) == ("zero1", "ddp")
    many, _ = chosen("1558m", 8, RTX)
    assert (many.sharding, many.activation_checkpointing) == ("zero1", True)
    assert chosen("1558m", 8, 15.6e9)[0].sharding == "fsdp"
    with pytest.raises(UserError, match=r"28\.0 GB.*21\.7 GB.*use more GPUs"):
        chosen("1558m", 1, RTX)
    with pytest.raises(UserError, match=r"runtime\.sharding=fsdp"):
        chosen("1558m", 8, RTX, sharding="ddp")


def test_an_8_bit_head_takes_its_room_where_it_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: the gradient beside the logits, and the weight's 8-bit copies, left to the reserve; a smaller micro-batch
    on a GPU whose head stays in bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    config = load("124m", {"train.fp8_head": True}).train
    layouts = {}
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        settled, lines = resolve_runtime(config, Runtime(precision="bf16"), gpus(1), RTX)
        layouts[capability] = settled.micro_batch_size, next(line for line in lines if "<- chosen" in line)
    plain, text = chosen("124m", 1, RTX)
    assert layouts[8, 0][0] == plain.micro_batch_size and layouts[8, 0][1] in text
    assert layouts[9, 0] != layouts[8, 0]
    model = config.model
    usual, in_8_bits = (estimate_memory(model, "bf16", 1, "ddp", False, head=head) for head in (Head, Fp8Head))
    assert in_8_bits.fixed_bytes - usual.fixed_bytes == 2 * model.padded_vocab_size * model.n_embd
    assert in_8_bits.bytes_per_sequence - usual.bytes_per_sequence == model.block_size * model.padded_vocab_size


def test_what_is_given_is_kept() -> None:
    """Bug: "auto" overruling the user."""
    settled, _ = chosen("124m", 8, A100, micro_batch_size=48, sharding="zero1", activation_checkpointing=True)
    assert (settled.micro_batch_size, settled.sharding, settled.activation_checkpointing) == (48, "zero1", True)
    assert "512 sequences per step are not divisible by 8 x 48" in chosen("124m", 8, A100, micro_batch_size=48)[1]


def test_too_many_processes() -> None:
    """Bug: processes with nothing to do, which then wait for ever or divide by zero."""
    config = TrainConfig.model_validate(
        {"model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 64}, "optim": {"max_lr": 1, "warmup_steps": 0},
         "total_batch_size": 256, "max_steps": 1}
    )  # fmt: skip
    with pytest.raises(UserError, match=r"5 processes.* 4 sequences.*256 tokens of 64.*at most 4"):
        resolve_runtime(config, Runtime(), World(0, 0, 5, torch.device("cpu")), None)


def test_estimates_add_up() -> None:
    """Bug: zero1 or fsdp that saves more, or less, than it does."""
    model = ModelConfig(n_layer=48, n_head=25, n_embd=1600)
    n = model.n_params()
    ddp, zero1, fsdp = (estimate_memory(model, "bf16", 8, sharding, False) for sharding in ("ddp", "zero1", "fsdp"))
    assert ddp.fixed_bytes - zero1.fixed_bytes == pytest.approx(n * 8 * 7 / 8)
    assert fsdp.fixed_bytes < n * 3 and ddp.bytes_per_sequence == zero1.bytes_per_sequence
    assert estimate_memory(model, "bf16", 8, "ddp", True).bytes_per_sequence < ddp.bytes_per_sequence / 3
    assert ddp.max_sequences(ddp.fixed_bytes + 2.5 * ddp.bytes_per_sequence) == 2 and ddp.max_sequences(0) == 0


def test_the_find_largest() -> None:
    """Bugs: a micro-batch that is no divisor, a trial that goes on after success, memory held by a failed trial."""
    assert candidates(512, 64)[:4] == [64, 32, 16, 8] and candidates(12, 5) == [4, 3, 2, 1]
    tried = []

    def attempt(micro: int) -> None:
        tried.append(micro)
        if micro > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free")

    assert find_largest(candidates(12, 6), attempt, SINGLE_PROCESS) == 3
    assert tried == [6, 4, 3]
    with pytest.raises(UserError, match="micro-batch of 4"):
        find_largest([6, 4], attempt, SINGLE_PROCESS)


def test_out_of_memory_names_what_to_change() -> None:
    """Bug: an allocator's page of text that says nothing of micro-batches."""
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. More. And."
    )
    text = str(explain_out_of_memory(error, Runtime(micro_batch_size=8, activation_checkpointing=False)))
    assert "runtime.micro_batch_size=4" in text and "runtime.activation_checkpointing=true" in text
    assert "Tried to allocate 2.00 GiB" in text and "And" not in text
    assert "micro_batch_size=" not in str(explain_out_of_memory(error, Runtime(micro_batch_size=1)))
