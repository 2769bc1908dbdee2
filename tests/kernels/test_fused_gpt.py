"""The fused model against autograd, its contract with the training loop, and the fallbacks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from bench.loss_check import TrainRun, check, losses_of, real_batches, zipf_tokens
from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig, OptimConfig, TrainConfig
from gpt2.distributed import SINGLE_PROCESS
from gpt2.kernels import triton_or_none
from gpt2.kernels.block import Recompute
from gpt2.kernels.cublaslt import CublasLtError
from gpt2.kernels.fused_gpt import FusedGPT, ReferenceGPT, accelerate, activation_bytes, head_kind
from gpt2.kernels.head import Fp8Head, Head
from gpt2.kernels.linear import FusedLinear, Linear
from gpt2.model.gpt import GPT
from gpt2.shards import ShardWriter
from gpt2.train.build import build_model, has_fp8_head
from gpt2.train.parallel import DataParallel, GradientBuckets

CONFIG = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=16, vocab_size=100)
CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(triton_or_none.INTERPRETED, reason="fp64 needs the plain versions")


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int.from_bytes(os.urandom(3), "big")
    print(f"seed {value}")
    torch.manual_seed(value)
    torch.set_num_threads(1)
    return value


def random_model(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> GPT:
    """All parameters are random, biases and gains too, so that an unused one shows."""
    model = GPT(config).to(dtype)
    model.init_weights(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model


def random_batch(config: ModelConfig = CONFIG, B: int = 2, T: int = 12) -> tuple[Tensor, Tensor]:
    idx, targets = (torch.randint(0, config.vocab_size, (B, T)) for _ in range(2))
    targets[0, :3] = -1
    return idx, targets


def distance(model: GPT, other: GPT) -> float:
    """Largest relative error over the parameters' gradients."""
    errors = [
        float((p.grad - q.grad).norm() / q.grad.norm())
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    ]
    assert len(errors) == len(list(other.parameters()))
    return max(errors)


@interpreted
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_gradients_differ_from_autograd(recompute: Recompute) -> None:
    """Bugs: a term missing in the backward pass; a gradient added twice, or lost between micro-steps."""
    model = random_model()
    plain = copy.deepcopy(model)
    fast = FusedGPT(model, Linear(), recompute, torch.float64)
    for _ in range(3):
        idx, targets = random_batch()
        loss, wanted = fast(idx, targets), plain(idx, targets)[1]
        assert loss.item() == pytest.approx(wanted.item(), abs=3e-6)  # the reference's softmax is fp32
        (loss / 3).backward()
        (wanted / 3).backward()
    assert distance(model, plain) < 3e-6


@pytest.mark.skipif(triton_or_none.INTERPRETED, reason="Triton's interpreter rounds to 8 bits wrongly")
def test_8_bit_head_trains_another_model() -> None:
    """Bug: head gradients of other weights or of another micro-step. Only rounding may differ."""
    model = random_model(dtype=torch.float32)
    plain = copy.deepcopy(model)
    fast = FusedGPT(model, Linear(), "none", torch.float32, Fp8Head)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, plain)]
    for _ in range(3):
        for each in optimizers:
            each.zero_grad()
        for _ in range(2):
            idx, targets = random_batch(B=4)
            loss, wanted = fast(idx, targets), plain(idx, targets)[1]
            assert loss.item() == pytest.approx(wanted.item(), abs=0.01) and loss.item() != wanted.item()
            (loss / 2).backward()
            (wanted / 2).backward()
        assert distance(model, plain) < 0.15
        for each in optimizers:
            each.step()


@interpreted
def test_losses_without_gradients_differ_from_the_reference() -> None:
    """Bug: evaluation computes something else than training, or builds an autograd graph."""
    model = random_model()
    fast = FusedGPT(model, Linear(), dtype=torch.float64)
    idx, targets = random_batch()
    wanted = model(idx, targets, "none")[1].detach()
    got = fast.token_losses(idx, targets)
    assert not got.requires_grad
    assert (got - wanted).abs().max() < 1e-5
    assert torch.allclose(fast.hidden(idx), model.hidden(idx).detach(), atol=1e-10)
    with torch.no_grad():
        mean = fast(idx, targets)
    in_training = fast(idx, targets)
    assert mean.item() == pytest.approx(in_training.item(), abs=1e-6)


@interpreted
def test_gradients_leave_their_flat_buffer() -> None:
    """Bugs: `.grad` no longer points into the flat buffer that is all-reduced; hooks are not called. Both let replicas
    diverge silently."""
    model = random_model()
    fast = FusedGPT(model, Linear(), dtype=torch.float64)
    parameters = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    views = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]
    called: list[Tensor] = []
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view
        parameter.register_post_accumulate_grad_hook(called.append)
    plain = copy.deepcopy(random_model())
    plain.load_state_dict(model.state_dict())
    for _ in range(2):
        idx, targets = random_batch()
        fast(idx, targets).backward()
        plain(idx, targets)[1].backward()
    assert len(called) == 2 * len(parameters)
    assert all(p.grad is not None and p.grad.data_ptr() == v.data_ptr() for p, v in zip(parameters, views, strict=True))
    assert distance(model, plain) < 3e-6


def new_weights_by_optimizer(model: GPT) -> None:
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def new_weights_from_a_checkpoint(model: GPT) -> None:
    model.load_state_dict(random_model(dtype=torch.float32).state_dict())


def new_weights_behind_autograds_back(model: GPT) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


@pytest.mark.parametrize(
    "change", [new_weights_by_optimizer, new_weights_from_a_checkpoint, new_weights_behind_autograds_back]
)
def test_stale_bf16_weights_after_an_update(change: Callable[[GPT], None]) -> None:
    """Bug: training continues with the weights of an earlier step."""
    model = random_model(dtype=torch.float32)
    fast = FusedGPT(model, Linear(), dtype=torch.bfloat16)
    idx, targets = random_batch()
    fast(idx, targets).backward()
    change(model)
    model.zero_grad(set_to_none=True)
    fresh = FusedGPT(copy.deepcopy(model), Linear(), dtype=torch.bfloat16)
    assert fast(idx, targets).item() == fresh(idx, targets).item()
    assert torch.equal(fast.token_losses(idx, targets), fresh.token_losses(idx, targets))


def test_bf16_training_diverges_from_the_reference(tmp_path: pytest.TempPathFactory) -> None:
    """Bug: a biased loss curve: bf16 passes against fp32, on a CPU."""
    config = TrainConfig(
        model=CONFIG, optim=OptimConfig(max_lr=3e-3, warmup_steps=2), total_batch_size=128, max_steps=30
    )
    tokens = torch.randint(0, 10, (1000,)).cumsum(0) % 100
    path = tmp_path / "text_train_000001.bin"  # type: ignore[operator]
    with ShardWriter(path) as shard:
        shard.write(tokens.numpy().astype("uint16"))
    plain = losses_of(config, Runtime(kernels="reference"), SINGLE_PROCESS, path, 4, config.max_steps)

    class Fast(TrainRun):
        def __init__(self) -> None:
            super().__init__(config, Runtime(gpus=0, micro_batch_size=4), SINGLE_PROCESS)
            self.loss_fn = FusedGPT(self.parallel.model, Linear(), dtype=torch.bfloat16)

    loop = Fast()
    batches = real_batches(path, config.model, config.sequences_per_step, CPU)
    fast = [loop.step(step, next(batches)) for step in range(config.max_steps)]
    assert plain[-1] < plain[0] - 0.3
    difference = sum(b - a for a, b in zip(plain, fast, strict=True)) / len(plain)
    assert abs(difference) < 0.003


def test_stale_bf16_weights_with_bucketed_gradients() -> None:
    """Bug: bf16 weights are never refreshed if gradients stay allocated, as with several processes: the fused AdamW
    updates a weight without incrementing its version."""
    idx, targets = random_batch()
    curves: list[list[float]] = []
    for bucketed in (False, True):
        torch.manual_seed(0)
        model = random_model(dtype=torch.float32)
        fast = FusedGPT(model, Linear(), dtype=torch.bfloat16)
        replicas = DataParallel(model, OptimConfig(max_lr=1e-2, warmup_steps=0), SINGLE_PROCESS)
        if bucketed:
            replicas.buckets = GradientBuckets(list(model.parameters()), SINGLE_PROCESS)
        curves.append([])
        for _ in range(6):
            loss = fast(idx, targets)
            loss.backward()
            replicas.clip_grad_norm(1.0)
            replicas.optimizer_step(1e-2)
            replicas.zero_grad()
            curves[-1].append(loss.item())
    assert curves[0][-1] < curves[0][0] - 0.2
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.parametrize(("compiled", "expected"), [(True, 1), (False, 0), ("auto", 0)])
def test_reference_is_compiled_only_on_request(
    compiled: bool | Literal["auto"], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: results reported as compiled come from eager code."""
    calls: list[object] = []
    monkeypatch.setattr(ReferenceGPT, "compile", lambda path: calls.append(path))
    accelerate(random_model(dtype=torch.float32), Runtime(kernels="reference", compile=compiled), CPU)
    assert len(calls) == expected


def test_unsupported_8_bit_head_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a run is reported as 8-bit and is not."""
    optim = OptimConfig(max_lr=1e-3, warmup_steps=1)
    config = TrainConfig(model=CONFIG, optim=optim, total_batch_size=64, max_steps=4, fp8_head=True)
    _, loss_fn = build_model(config, Runtime(precision="fp32", sharding="ddp", compile=False), SINGLE_PROCESS)
    assert "train.fp8_head" in capsys.readouterr().err
    assert not has_fp8_head(loss_fn) and not has_fp8_head(FusedGPT(random_model(), Linear()))
    assert has_fp8_head(FusedGPT(random_model(), Linear(), head=Fp8Head))


@pytest.mark.parametrize(
    ("capability", "fused", "changed", "obstacle"),
    [
        ((9, 0), True, {}, None),
        ((8, 6), True, {}, "An RTX has no 8-bit floats"),
        ((9, 0), False, {}, "cuBLASLt is not used"),
        ((9, 0), True, {"n_embd": 24}, "n_embd 24 is not a multiple of 16"),
        ((9, 0), True, {"block_size": 1000}, "block_size 1,000 is not a multiple of 16"),
    ],
)
def test_8_bit_head_on_unsupported_hardware_or_sizes(
    capability: tuple[int, int], fused: bool, changed: dict[str, int], obstacle: str | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Bugs: 8-bit products on a GPU or with sizes that do not support them fail in the first step; a silent
    fallback."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An RTX")
    products = FusedLinear.__new__(FusedLinear) if fused else Linear()
    tried: list[torch.dtype] = []
    monkeypatch.setattr(
        FusedLinear, "fp8_", lambda self, out, *rest, **options: tried.append(out.dtype) or Linear().fp8_(out, *rest)
    )
    config = CONFIG.model_copy(update=changed)
    assert head_kind(config, CPU, products) is (Fp8Head if obstacle is None else Head)
    assert capsys.readouterr().err == (f"the head stays in bf16: {obstacle}\n" if obstacle else "")
    bf16, fp32 = torch.bfloat16, torch.float32
    assert tried == ([bf16, bf16, fp32, bf16, fp32] if obstacle is None else [])  # forward, and back both ways


def test_gpu_without_an_8_bit_algorithm_crashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a traceback in the first step instead of the bf16 head."""

    def none(*arguments: object, **options: object) -> Tensor:
        raise CublasLtError("cublasLtMatmulAlgoGetHeuristic returned status 15")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(FusedLinear, "fp8_", none)
    assert head_kind(CONFIG, CPU, FusedLinear.__new__(FusedLinear)) is Head
    assert "stays in bf16: cublasLtMatmulAlgoGetHeuristic returned status 15" in capsys.readouterr().err


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_fallback_on_a_cpu_is_noisy_or_inexact(
    kernels: Literal["auto", "reference"], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: messages or other losses on a CPU, which has no fused kernels."""
    model = random_model(dtype=torch.float32)
    loss = accelerate(model, Runtime(kernels=kernels), CPU)
    assert not isinstance(loss, FusedGPT)
    assert [id(p) for p in loss.parameters()] == [id(p) for p in model.parameters()]
    batch = random_batch()
    assert loss(*batch).item() == pytest.approx(model(*batch)[1].item(), abs=1e-5)
    assert capsys.readouterr().err == ""


def test_sequence_longer_than_block_size() -> None:
    """Bug: reads past the end of wpe, which a GPU kernel does not detect."""
    fast = FusedGPT(random_model(dtype=torch.float32), Linear())
    with pytest.raises(ValueError, match=r"17 tokens .* 16"):
        fast(*random_batch(T=17))


def tensors_in(kept: Any) -> list[Tensor]:
    if isinstance(kept, Tensor):
        return [kept]
    return [tensor for part in kept for tensor in tensors_in(part)] if isinstance(kept, tuple) else []


def test_memory_estimate_of_the_8_bit_head() -> None:
    """Bug: the estimate omits the gradient next to the logits, or its transpose."""
    rows, C, V = 64, 32, 512
    weight = torch.randn(V, C, dtype=torch.bfloat16)
    head = Fp8Head(Linear(), weight, 500)
    h, targets = torch.randn(rows, C, dtype=torch.bfloat16), torch.randint(0, 500, (rows,))
    _, saved = head.losses(h, targets, torch.tensor(64.0))
    a_row = sum(tensor.nbytes for tensor in saved if tensor.numel() % rows == 0 and tensor.size(0) != C) / rows
    logits, gradient, turned = 2 * V, V, V
    assert a_row == gradient
    assert head.bytes_per_logit * V == max(logits + gradient, gradient + turned)
    copies = head._weight8
    assert copies is not None and head.bytes_per_weight * V * C == copies.rows.nbytes + copies.columns.nbytes


def test_activation_bytes_underestimates() -> None:
    """Bug: a run exceeds the GPU's memory. The reference is the tensors that a forward pass saves."""
    model = random_model(dtype=torch.float32)
    for recompute in ("none", "cheap", "block"):
        fast = FusedGPT(model, Linear(), recompute, torch.float32)  # type: ignore[arg-type]
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = fast(*random_batch(B=4, T=16))
        node, blocks = loss.grad_fn, 0
        while node is not None:  # tensors that the hooks do not see
            own = getattr(node, "activations", None)
            kept += sum(tensor.nbytes for tensor in tensors_in(own))
            kept += sum(tensor.nbytes for tensor in tensors_in(getattr(node, "head_saved", ())))
            blocks += own is not None
            following = (after for after, _ in node.next_functions if after is not None)
            node = next((after for after in following if "Backward" in after.name()), None)
        assert blocks == (0 if recompute == "block" else CONFIG.n_layer)
        estimate = activation_bytes(CONFIG, 64, recompute)  # type: ignore[arg-type]
        working = 16 * 2 * 64 * CONFIG.n_embd  # one block's temporaries, which are not saved
        assert 0.8 * (estimate - working) < kept / 2 <= estimate  # fp32 here, bf16 there


def test_check_compares_other_tokens_or_weights(tmp_path: pytest.TempPathFactory) -> None:
    """Bug: the two curves use different tokens or weights. On a CPU the paths differ by rounding only, seeds by
    more."""
    config = TrainConfig(model=CONFIG, optim=OptimConfig(max_lr=1e-3, warmup_steps=1), total_batch_size=64, max_steps=4)
    path = tmp_path / "text_train_000001.bin"  # type: ignore[operator]
    with ShardWriter(path) as shard:
        shard.write(torch.randint(0, 100, (500,)).numpy().astype("uint16"))
    assert check(config, Runtime(), SINGLE_PROCESS, path, 2, 4)["largest"] < 1e-5
    other = losses_of(config.model_copy(update={"seed": 7}), Runtime(), SINGLE_PROCESS, path, 2, 4)
    assert other != losses_of(config, Runtime(), SINGLE_PROCESS, path, 2, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_gradients_on_a_gpu_differ_from_fp32(recompute: str) -> None:
    """Bug: a correct kernel gets wrong inputs. The error of bf16 over three layers is 1 %."""
    config = ModelConfig(n_layer=3, n_head=4, n_embd=256, block_size=256)
    device = torch.device("cuda")
    model = GPT(config)
    model.init_weights(1)
    model.to(device)
    plain = copy.deepcopy(model)
    runtime = Runtime(activation_checkpointing={"none": False, "cheap": "auto", "block": True}[recompute])  # type: ignore[arg-type]
    fast = accelerate(model, runtime, device)
    assert isinstance(fast, FusedGPT)
    fast._recompute = recompute  # type: ignore[assignment]
    idx, targets = zipf_tokens(config, 8, device)
    for part in range(2):
        rows = slice(4 * part, 4 * part + 4)
        loss, wanted = fast(idx[rows], targets[rows]), plain(idx[rows], targets[rows])[1]
        assert loss.item() == pytest.approx(wanted.item(), abs=2e-3)
        (loss / 2).backward()
        (wanted / 2).backward()
    assert distance(model, plain) < 0.03
