"""GPT-2 in plain PyTorch: the readable reference that tests compare every faster implementation with.

Pre-LayerNorm decoder with learned positions, biases everywhere except in the head, GELU in its tanh form, and a head
tied to the token embedding (Radford et al. 2019; llm.c's train_gpt2). No dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt2.config.train import LAYER_NORM_EPS, ModelConfig

IGNORE = -1  # a target that is not scored
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v, each (B, nh, T, hs) -> (B, nh, T, hs)"""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CausalSelfAttention(nn.Module):
    """Self-attention over n_head heads of hs = n_embd / n_head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attention: AttentionFn = causal_attention) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        y = attention(q, k, v)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attention: AttentionFn = causal_attention) -> Tensor:
        x = x + self.attn(self.ln_1(x), attention)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class Transformer(nn.Module):
    """Embeddings, blocks and the last LayerNorm; Hugging Face's `transformer`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)


class GPT(nn.Module):
    """GPT-2 with Hugging Face's parameter names: transformer.wte, transformer.h.0.attn.c_attn, ...

    The token embedding has config.padded_vocab_size rows; rows from vocab_size on are zero and excluded from the
    softmax, so they never get a gradient. There is no lm_head module: the head is wte.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # activation checkpointing per block
        self.transformer = Transformer(config)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.transformer.h))

    def hidden(self, idx: Tensor) -> Tensor:
        """Hidden states after the last LayerNorm: (B, T) int64 -> (B, T, C).

        Raises:
            ValueError: T is above block_size.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T:,} tokens does not fit into block_size {self.config.block_size:,}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss_reduction: Literal["mean", "none"] = "mean"
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or with targets the cross-entropy.

        Args:
            idx: (B, T) int64 token ids.
            targets: (B, T) int64, the next token of each position; -1 is not scored.
            loss_reduction: "mean" over the scored tokens, or "none" for (B, T) losses, 0 where not scored.

        Returns:
            (logits (B, T, vocab_size), None) without targets; (None, loss in nats) with.
        """
        x = self.hidden(idx)  # (B, T, C)
        weight, V = self.transformer.wte.weight, self.config.vocab_size
        # GPUs are faster on the padded width; on a CPU, cutting off the padding first saves a copy.
        logits = F.linear(x, weight)[..., :V] if x.is_cuda else F.linear(x, weight[:V])  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=loss_reduction
        )
        return None, loss.view_as(targets) if loss_reduction == "none" else loss

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize as llm.c: N(0, 0.02), both c_proj N(0, 0.02 / sqrt(2 n_layer)), biases 0, LayerNorm gains 1.

        One CPU generator draws wte (without padding), wpe, then per block c_attn, attn.c_proj, c_fc, mlp.c_proj: the
        order of torch's `apply`. The weights depend on the seed only, not on the device, the number of processes or the
        global random state.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 * (2 * self.config.n_layer) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                rows = self.config.vocab_size if name.endswith("wte.weight") else parameter.size(0)
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                parameter.zero_()
                parameter[:rows] = torch.empty(rows, parameter.size(1)).normal_(0.0, std, generator=generator)
