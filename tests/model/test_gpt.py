"""The model against what nobody here wrote: transformers' GPT-2 and torch's own initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gpt2.config.train import ModelConfig
from gpt2.flops import flops_per_token, mfu, peak_flops
from gpt2.model.gpt import GPT

TINY = ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=211)
GPT2_124M = ModelConfig(n_layer=12, n_head=12, n_embd=768)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.set_num_threads(1)
    gpt = GPT(TINY)
    gpt.init_weights(42)
    return gpt


def batch(seed: int = 0, B: int = 3, T: int = TINY.block_size) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, TINY.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def test_logits_loss_and_gradients_are_hugging_faces(model: GPT) -> None:
    """Bugs: a wrong GELU, LayerNorm eps, attention scale, missing bias, or a transposed matrix of the right shape."""
    transformers = pytest.importorskip("transformers")
    from gpt2.architecture import hf_config
    from gpt2.model.weights import to_hf

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(TINY)))
    # gains, biases and residual projections away from their initial values, or errors in them would not show
    gpt = GPT(TINY)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        gpt.transformer.wte.weight[TINY.vocab_size :] = 0
    missing, unexpected = theirs.load_state_dict(to_hf(gpt), strict=False)
    assert list(missing) == ["lm_head.weight"] and not unexpected
    theirs.tie_weights()

    idx, targets = batch()
    expected = theirs(idx)
    logits, _ = gpt(idx)
    _, loss = gpt(idx, targets)
    assert logits is not None and loss is not None
    assert logits.shape == (3, 24, TINY.vocab_size)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    expected_loss = nn.functional.cross_entropy(expected.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)

    loss.backward()
    expected_loss.backward()
    gradients = to_hf_of({name: p.grad for name, p in gpt.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def to_hf_of(tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    from gpt2.model.weights import hf_layout

    return hf_layout({name: tensor for name, tensor in tensors.items() if tensor is not None}, TINY)


class PlainBlock(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.ln_1, self.c_attn, self.attn_proj = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ln_2, self.c_fc, self.mlp_proj = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)


class PlainGPT(nn.Module):
    """Module order of llm.c's train_gpt2.py, initialised through torch's own `apply`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.config = config
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
        self.h = nn.ModuleList([PlainBlock(C) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(C)
        self.projections = {id(m) for block in self.h for m in (block.attn_proj, block.mlp_proj)}
        self.rng = torch.Generator()
        self.rng.manual_seed(42)
        self.apply(self.init)

    def init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if id(module) in self.projections else 0.02
            nn.init.normal_(module.weight, mean=0.0, std=std, generator=self.rng)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02, generator=self.rng)


def test_initial_weights_are_torchs_in_the_recipes_order(model: GPT) -> None:
    """Bugs: another order of draws, a shared generator, the projection's scale, the padded rows drawn from it."""
    plain = PlainGPT(TINY)
    torch.manual_seed(7)  # the global state must not matter
    again = GPT(TINY)
    again.init_weights(42)
    for ours, expected in (
        (again.transformer.wte.weight[: TINY.vocab_size], plain.wte.weight),
        (again.transformer.wpe.weight, plain.wpe.weight),
        *((o.attn.c_attn.weight, e.c_attn.weight) for o, e in zip(again.blocks, plain.h, strict=True)),
        *((o.attn.c_proj.weight, e.attn_proj.weight) for o, e in zip(again.blocks, plain.h, strict=True)),
        *((o.mlp.c_fc.weight, e.c_fc.weight) for o, e in zip(again.blocks, plain.h, strict=True)),
        *((o.mlp.c_proj.weight, e.mlp_proj.weight) for o, e in zip(again.blocks, plain.h, strict=True)),
    ):
        assert torch.equal(ours, expected)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_padded_rows_stay_zero_and_outside_the_softmax(model: GPT) -> None:
    """Bug: probability leaking to tokens that do not exist, or weight decay and gradients moving their rows."""
    idx, targets = batch()
    logits, _ = model(idx)
    _, loss = model(idx, targets)
    assert logits is not None and loss is not None and logits.size(-1) == TINY.vocab_size
    assert torch.allclose(torch.softmax(logits, -1).sum(-1), torch.ones(3, 24))
    loss.backward()
    assert model.transformer.wte.weight.grad is not None
    assert (
        not model.transformer.wte.weight[TINY.vocab_size :].any()
        and not model.transformer.wte.weight.grad[TINY.vocab_size :].any()
    )
    model.zero_grad()


def test_losses_of_tokens(model: GPT) -> None:
    """Bug: per-token losses in another order than the tokens, or unscored targets counted in the mean."""
    idx, targets = batch()
    masked = targets.clone()
    masked[:, ::2] = -1
    _, each = model(idx, masked, loss_reduction="none")
    _, mean = model(idx, masked)
    logits, _ = model(idx)
    assert each is not None and mean is not None and logits is not None
    assert each.shape == targets.shape and not each[:, ::2].any()
    expected = -torch.log_softmax(logits, -1)[1, 5, targets[1, 5]]
    torch.testing.assert_close(each[1, 5], expected)
    torch.testing.assert_close(mean, each[:, 1::2].mean())


def test_no_token_sees_the_future(model: GPT) -> None:
    """Bug: a missing causal mask, which makes every loss too good to be true."""
    idx, _ = batch()
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % TINY.vocab_size
    a, b = model(idx)[0], model(changed)[0]
    assert a is not None and b is not None
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_recomputed_blocks_give_the_same_gradients(model: GPT) -> None:
    """Bug: activation checkpointing that changes the result."""
    idx, targets = batch()
    grads = []
    for recompute in (False, True):
        model.checkpoint_blocks = recompute
        loss = model(idx, targets)[1]
        assert loss is not None
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    model.checkpoint_blocks = False
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_parameter_count_is_the_published_one() -> None:
    """Bug: a bias too many; n_params written apart from the model."""
    with torch.device("meta"):
        gpt = GPT(GPT2_124M)
    assert sum(p.numel() for p in gpt.parameters()) == 124_475_904
    assert GPT2_124M.n_params() == 124_439_808


def test_mfu_names_its_formula() -> None:
    """Bug: the two conventions, 7 % apart, mixed up. llm.c on one H100: 545,700 tokens/s are 44.4 %."""
    assert flops_per_token(GPT2_124M, "nanogpt") / flops_per_token(GPT2_124M) == pytest.approx(1.07, abs=0.005)
    assert mfu(GPT2_124M, 545_700, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.444, abs=0.002)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A100X", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H800", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX 4000 SFF Ada Generation", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks_of_look_alike_names(name: str, tera: float | None) -> None:
    """Bug: a substring decides: RTX A1000 has A100's peak, L40 has L4's, H200 NVL has H200's, a MIG slice the GPU's."""
    assert peak_flops(name) == (None if tera is None else tera * 1e12)
