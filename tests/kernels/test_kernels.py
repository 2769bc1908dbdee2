"""Each kernel against its formula in fp64. With TRITON_INTERPRET=1 and Triton installed, the kernels run on a CPU; with
neither a GPU nor the interpreter, only the plain PyTorch versions are tested."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.kernels import (
    attention,
    autotune_cache,
    cross_entropy,
    decode,
    embedding,
    fp8,
    gelu,
    layer_norm,
    triton_or_none,
)
from gpt2.kernels.head import Fp8Head
from gpt2.kernels.linear import FusedLinear, Linear
from gpt2.kernels.row_sum import row_sum
from gpt2.machine import AUTOTUNE_CACHE
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import CachedDecoder

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KERNELS = triton_or_none.AVAILABLE and (GPU or triton_or_none.INTERPRETED)
DTYPES = [torch.bfloat16, torch.float32] if KERNELS else [torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 2e-5, torch.float64: 1e-12}
WIDTHS = [48, 768, 1600] if GPU else [48, 80]

exact_casts = pytest.mark.skipif(triton_or_none.INTERPRETED, reason="Triton's interpreter rounds to 8 bits wrongly")

if not KERNELS:
    print("Triton kernels are not run here: no GPU, or no TRITON_INTERPRET=1; the plain versions are tested")


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int.from_bytes(os.urandom(3), "big")
    print(f"seed {value}")
    torch.manual_seed(value)
    torch.set_num_threads(1)
    return value


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float64).to(dtype)


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative error in the 2-norm; a NaN never passes."""
    got, wanted = got.detach().double(), wanted.double()
    error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    assert error < tolerance, f"relative error {error:.2e}, at most {tolerance:.0e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", WIDTHS)
def test_layer_norm(C: int, dtype: torch.dtype) -> None:
    """Bugs: masked columns in mean or variance; rows past the end; a residual gradient left out."""
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy, residual = (random(37, C, dtype=dtype) for _ in range(3))
    weight, bias = random(C, dtype=stats) + 1, random(C, dtype=stats)
    y, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5)
    dx, dweight, dbias, dx_sum = layer_norm.backward(dy, residual, x, mean, rstd, weight)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    wanted = F.layer_norm(leaves[0], (C,), leaves[1], leaves[2], 1e-5)
    wanted.backward(dy.double())
    assert_close(y, wanted, TOLERANCE[dtype])
    assert leaves[0].grad is not None and leaves[1].grad is not None and leaves[2].grad is not None
    assert_close(dx, leaves[0].grad + residual.double(), TOLERANCE[dtype])
    assert_close(dweight, leaves[1].grad, 1e-5)
    assert_close(dbias, leaves[2].grad, 1e-5)
    assert_close(dx_sum, (leaves[0].grad + residual.double()).sum(0), 1e-4)
    half = torch.tensor(0.5, device=DEVICE)
    alone, half_dweight, _, _ = layer_norm.backward(dy, None, x, mean, rstd, weight, half)
    assert_close(alone, leaves[0].grad / 2, TOLERANCE[dtype])
    assert_close(half_dweight, leaves[1].grad / 2, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, M", [(37, 80), (1000, 2304)] if GPU else [(37, 80), (70, 300)])
def test_row_sum(N: int, M: int, dtype: torch.dtype) -> None:
    """Bugs: rows or columns past the end; partial sums left out."""
    x = random(N, M, dtype=dtype)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(row_sum(x, total), x.double().sum(0), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype: torch.dtype) -> None:
    """Bugs: the exact form instead of GPT-2's tanh form; overflow far from zero."""
    u = random(5, 1000, dtype=dtype) * 3
    u[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -12.0], dtype=dtype)
    da = random(5, 1000, dtype=dtype)
    leaf = u.double().requires_grad_()
    wanted = F.gelu(leaf, approximate="tanh")
    wanted.backward(da.double())
    assert_close(gelu.forward(u), wanted, TOLERANCE[dtype])
    assert leaf.grad is not None
    assert_close(gelu.backward(da, u), leaf.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V, vocab", [(256, 250), (50304, 50257)] if GPU else [(256, 250), (128, 128)])
def test_cross_entropy(V: int, vocab: int, dtype: torch.dtype) -> None:
    """Bugs: padding in the softmax; gradients in padded columns; ignored rows counted; a lost maximum."""
    logits = random(9, V, dtype=dtype) * 4
    logits[3, 17] = 60.0
    logits[4, vocab - 2] = 150.0  # overflows relative to what comes first
    logits[:, vocab:] = 100.0  # whatever stands there
    targets = torch.randint(0, vocab, (9,), device=DEVICE)
    targets[2], targets[5] = -1, vocab - 1
    scored = torch.tensor(8.0, device=DEVICE)
    leaf = logits[:, :vocab].double().requires_grad_()
    wanted = F.cross_entropy(leaf, targets, ignore_index=-1, reduction="none")
    (wanted.sum() / 8).backward()

    kept = logits.clone()
    assert_close(cross_entropy.losses(logits, targets, vocab), wanted, 1e-5)
    assert torch.equal(kept, logits)
    beside = torch.full_like(logits, float("nan"))
    assert_close(cross_entropy.losses(logits, targets, vocab, scored, beside), wanted, 1e-5)
    assert torch.equal(kept, logits)
    assert_close(cross_entropy.losses(logits, targets, vocab, scored), wanted, 1e-5)
    assert torch.equal(logits, beside)
    assert leaf.grad is not None
    assert_close(logits[:, :vocab], leaf.grad, TOLERANCE[dtype])
    assert not logits[:, vocab:].any() and not logits[2].any()


@exact_casts
@pytest.mark.parametrize("M, N", [(37, 80), (256, 768), (300, 129)])
def test_8_bit_copies(M: int, N: int) -> None:
    """Bugs: a scale that overflows to NaN or wastes range; tiles past the edge; a wrong transpose."""
    x = random(M, N, dtype=torch.bfloat16) * 1e-3
    x[3, 5] = 7.0
    copies = fp8.quantize(x)
    assert copies.rows.dtype == torch.float8_e4m3fn and copies.rows.float()[3, 5] == 448
    back = copies.rows.float() * copies.scale
    spacing = 2.0**-9 * float(copies.scale)  # of the smallest numbers
    assert bool(((back - x.float()).abs() <= x.float().abs() / 16 + spacing / 2).all())
    assert torch.equal(copies.columns.view(torch.uint8), copies.rows.view(torch.uint8).t().contiguous())
    gradient = x.to(torch.float8_e5m2)
    turned = fp8.transpose(gradient)
    assert turned.is_contiguous() and turned.dtype == gradient.dtype
    assert torch.equal(turned.view(torch.uint8), gradient.view(torch.uint8).t())
    nothing = fp8.quantize(torch.zeros_like(x))
    assert not nothing.rows.float().any() and bool(nothing.scale.isfinite())


@exact_casts
@pytest.mark.parametrize("kind", ["plain", pytest.param("cublaslt", marks=pytest.mark.gpu)])
def test_8_bit_head_differs_from_its_formula(kind: str) -> None:
    """Bugs: a scale omitted or applied twice; a stale weight; ignored rows counted; gradients not accumulated; a number
    of rows that 8-bit products do not support. The reference is the formula on the rounded factors."""
    if kind == "cublaslt" and not (GPU and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("needs a GPU with 8-bit floats")
    products = FusedLinear(DEVICE) if kind == "cublaslt" else Linear()
    rows, C, V, vocab = 64, 64, 256, 250
    h, weight = random(rows, C, dtype=torch.bfloat16) * 3, random(V, C, dtype=torch.bfloat16) * 0.2
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    targets[2] = -1
    scored, dloss = torch.tensor(rows - 1.0, device=DEVICE), torch.tensor(0.25, device=DEVICE)
    head = Fp8Head(products, weight, vocab)
    head.losses(h, targets, scored)
    weight *= 0.5
    head.weight_changed()
    losses, saved = head.losses(h, targets, scored)
    before = random(V, C)
    dweight = before.clone()
    dh = head.backward(saved, dweight, True, dloss)
    with pytest.raises(ValueError, match="16 rows, not 63"):
        head.losses(h[:63], targets[:63], scored)

    rounded = [
        (copies.rows.double() * copies.scale).requires_grad_() for copies in (fp8.quantize(h), fp8.quantize(weight))
    ]
    logits = rounded[0] @ rounded[1][:vocab].T
    wanted = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    assert_close(losses, wanted, 6e-3)  # the logits are bf16
    (wanted.sum() / scored.double()).backward()
    assert rounded[0].grad is not None and rounded[1].grad is not None
    # e5m2 rounds by up to 1/8, 7 % on average over numbers of all sizes
    assert_close(dh, rounded[0].grad, 0.1)
    assert not dh[2].any()
    assert_close(dweight - before, rounded[1].grad * 0.25, 0.1)
    assert torch.equal(dweight[vocab:], before[vocab:])
    for got, right in ((dh, rounded[0].grad), (dweight - before, rounded[1].grad * 0.25)):  # no scale is off
        assert float((got.double() * right).sum() / right.square().sum()) == pytest.approx(1, abs=0.03)


@exact_casts
@pytest.mark.parametrize("zipf", [False, True])
def test_rounding_to_8_bits_biases_a_gradient(zipf: bool) -> None:
    """Bug: each row's gradient, which should sum to 0, sums to less at every step, and the mean logit drifts
    upwards."""
    N, V = 1024, 2048
    exponents = 0.8 + 0.4 * torch.rand(N, 1, device=DEVICE)  # so that the likeliest are not the same in all rows
    logits = -exponents * torch.rand(N, V, device=DEVICE).argsort(1).add(1).log() if zipf else random(N, V)
    targets = torch.randint(0, V, (N,), device=DEVICE)
    gradient = torch.empty_like(logits, dtype=torch.float8_e5m2)
    unit = torch.tensor(2.0**-15, device=DEVICE)

    def mean_sum(rounding_bias: float) -> float:
        cross_entropy.losses(logits.clone(), targets, V, unit, gradient, rounding_bias)
        own = torch.zeros_like(logits).scatter_(1, targets[:, None], 1.0).bool()
        p = logits.double().softmax(1).masked_fill(own, 0.0)
        rounded = gradient.double().masked_fill(own, 0.0) * 2.0**-15
        return float(rounded.sum() / p.sum()) - 1

    assert abs(mean_sum(fp8.GRADIENT_ROUNDING_BIAS)) < 0.0014  # seven standard deviations
    assert -0.0042 < mean_sum(1.0) < -0.0014


@pytest.mark.parametrize("deterministic", [False, True])
def test_embedding(deterministic: bool) -> None:
    """Bugs: gradients of a repeated token overwrite each other; positions counted over the whole batch."""
    torch.use_deterministic_algorithms(deterministic)
    B, T, C, V = 3, 7, 48, 20
    wte, wpe = random(V, C), random(16, C)
    idx = torch.randint(0, 4, (B, T), device=DEVICE)
    dx = random(B * T, C, dtype=torch.bfloat16)
    leaves = [t.double().requires_grad_() for t in (wte, wpe)]
    wanted = (leaves[0][idx] + leaves[1][:T]).view(B * T, C)
    wanted.backward(dx.double())
    assert_close(embedding.forward(idx, wte, wpe, torch.bfloat16), wanted, 6e-3)
    dwte, dwpe = torch.ones_like(wte), torch.ones_like(wpe)
    embedding.backward_(dx, idx, dwte, dwpe)
    torch.use_deterministic_algorithms(False)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert_close(dwte, leaves[0].grad + 1, 1e-5)
    assert_close(dwpe, leaves[1].grad + 1, 1e-5)


@pytest.mark.parametrize("kind", ["plain", pytest.param("cublaslt", marks=pytest.mark.gpu)])
def test_linear(kind: str) -> None:
    """Bugs: a swapped transpose; a bias along the wrong dimension; the exact GELU; a gradient not accumulated. All
    sizes differ, so that mixed-up dimensions fail."""
    if kind == "cublaslt" and not GPU:
        pytest.skip("needs a GPU")
    dtype = torch.bfloat16 if GPU else torch.float64
    total = torch.float32 if GPU else torch.float64
    close = 6e-3 if GPU else 1e-6 if KERNELS else 1e-12  # interpreted, GELU is computed in fp32
    products = FusedLinear(DEVICE) if kind == "cublaslt" else Linear()
    N, K, M = 512, 64, 192
    x, weight, bias, dy, residual = (random(*shape, dtype=dtype) for shape in ((N, K), (M, K), (M,), (N, M), (N, M)))
    X, W, b, dY, R = (t.double() for t in (x, weight, bias, dy, residual))
    assert_close(products.forward(x, weight), X @ W.T, close)
    assert_close(products.forward(x, weight, bias, residual), X @ W.T + b + R, close)
    u, a = products.forward_gelu(x, weight, bias)
    assert_close(u, X @ W.T + b, close)
    assert_close(a, F.gelu(X @ W.T + b, approximate="tanh"), close)
    scale = torch.tensor(0.125, device=DEVICE, dtype=total)
    assert_close(products.input_grad(dy, weight, scale), dY @ W * 0.125, close)

    before = random(N, K, dtype=dtype)
    leaf = before.double().requires_grad_()
    F.gelu(leaf, approximate="tanh").backward(dY @ W)
    assert leaf.grad is not None
    assert_close(products.input_grad_gelu(dy, weight, before), leaf.grad, close)

    tight = 1e-5 if GPU else 1e-12
    sums = random(M, K, dtype=total)
    start = sums.double().clone()
    products.weight_grad_(sums, True, dy, x, scale)
    assert_close(sums, start + dY.T @ X * 0.125, tight)
    products.weight_grad_(sums, False, dy, x)
    assert_close(sums, dY.T @ X, tight)
    products.weight_grad_(sums, True, dy, x)
    assert_close(sums, 2 * (dY.T @ X), tight)


@pytest.mark.parametrize("name", ["math", *(pytest.param(name, marks=pytest.mark.gpu) for name in attention.BACKENDS)])
def test_attention(name: str) -> None:
    """Bugs: heads in another order; a wrong scale; a mask that shows a later token; q, k, v gradients in wrong
    order."""
    B, T, nh, hs = 2, 128, 3, 64
    if name == "math":
        backend, dtype, close = attention.AttentionBackend(nh), torch.float64, 1e-12
    else:
        if not GPU:
            pytest.skip("needs a GPU")
        try:
            backend = attention.BACKENDS[name](nh)
        except ImportError as error:
            pytest.skip(str(error))
        dtype, close = torch.bfloat16, 1e-2
    qkv, dy = random(B, T, 3 * nh * hs, dtype=dtype), random(B, T, nh * hs, dtype=dtype)
    leaf = qkv.double().requires_grad_()
    q, k, v = (part.view(B, T, nh, hs).transpose(1, 2) for part in leaf.split(nh * hs, dim=2))
    scores = (q @ k.transpose(2, 3) / hs**0.5).masked_fill(
        torch.ones(T, T, dtype=torch.bool, device=DEVICE).triu(1), float("-inf")
    )
    wanted = (scores.softmax(3) @ v).transpose(1, 2).reshape(B, T, nh * hs)
    wanted.backward(dy.double())
    y, saved = backend.forward(qkv)
    assert y.is_contiguous()
    assert_close(y, wanted, close)
    assert leaf.grad is not None
    assert_close(backend.backward(dy, qkv, y, saved), leaf.grad, close)


@pytest.mark.skipif(not KERNELS, reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("n_embd", [64, 96])  # 96: masked columns
def test_fused_decoding_differs_from_plain_decoding_in_fp64(n_embd: int) -> None:
    """Bugs: a key written to another row's or head's slot; attention chunks combined with wrong weights; chunks after
    the row's position counted; columns past the width in LayerNorm."""
    config = ModelConfig(n_layer=2, n_head=n_embd // 32, n_embd=n_embd, block_size=300, vocab_size=101)
    model = GPT(config)
    model.init_weights(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and LayerNorms that do something
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(DEVICE)
    plain, cached = CachedDecoder(copy.deepcopy(model).double(), 3, 300), CachedDecoder(model, 3, 300)
    assert decode.is_supported(cached)
    fused = decode.FusedDecoder(cached)
    windows = [[1, 2], [3] * 127, [4] * 290]
    for decoder in (plain, cached):
        decoder.prefill([0, 1, 2], windows)
    positions = torch.tensor([2, 127, 290], device=DEVICE)
    for step in range(3):
        idx = torch.tensor([step, 7, 9], device=DEVICE)
        wanted = plain.masked_decode(idx.view(-1, 1), positions + step, 300)
        assert_close(fused.decode(idx, positions + step), wanted, 1e-5)
    for kept, right in zip([*cached.k, *cached.v], [*plain.k, *plain.v], strict=True):
        assert_close(kept, right, 1e-5)


def test_a_cached_algorithm_is_used_for_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: an algorithm of another library version or shape is reused; a damaged file or a read-only folder fails the
    start; deterministic runs use a measured algorithm."""
    key = {"what": "product", "key": (8, torch.float32), "version": 7}
    autotune_cache.store(key, "no folder")
    assert autotune_cache.load(key) is None
    monkeypatch.setenv(AUTOTUNE_CACHE, str(tmp_path / "cache"))
    autotune_cache.store(key, "fast")
    assert autotune_cache.load(key) == "fast"
    assert autotune_cache.load(key | {"version": 8}) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert autotune_cache.load(key) is None
    finally:
        torch.use_deterministic_algorithms(False)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(kept.read_text()[:20])
    assert autotune_cache.load(key) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(AUTOTUNE_CACHE, str(tmp_path / "file"))
    autotune_cache.store(key, "fast")

    def full(path: Path, text: str) -> None:
        raise UserError(f"no space left for {path}")

    monkeypatch.setattr(autotune_cache, "write_text", full)
    autotune_cache.store(key, "fast")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_second_start_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: an algorithm deserializes as another one; the second start measures everything again."""
    monkeypatch.setenv(AUTOTUNE_CACHE, str(tmp_path))
    x, weight, bias = (random(*shape, dtype=torch.bfloat16) for shape in ((512, 64), (192, 64), (192,)))
    once = FusedLinear(DEVICE).forward(x, weight, bias)
    chosen = attention.select_backend(3, 192, 2, 128, DEVICE).name

    def measured(run: object, repeats: int = 5) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr("gpt2.kernels.cublaslt.time_ms", measured)
    monkeypatch.setattr("gpt2.kernels.attention.time_ms", measured)
    assert torch.equal(FusedLinear(DEVICE).forward(x, weight, bias), once)
    assert attention.select_backend(3, 192, 2, 128, DEVICE).name == chosen
