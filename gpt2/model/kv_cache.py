"""GPT-2's blocks with the keys and values of all earlier tokens kept, so that one more token costs one token.

Works on the weights of a `gpt2.model.gpt.GPT` and calls none of its kernels, so that training may choose those freely.
Recomputing n tokens costs n whole forward passes; here each costs one pass over one position, plus reading the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2.model.gpt import GPT, LAYER_NORM_EPS

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def read_at(model: GPT, idx: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """GPT-2's blocks over idx (R, T) at positions that broadcast to it; (R, T, C) after the last LayerNorm.

    Args:
        attend: (layer, q, k, v), each (R, nh, T, hs) -> (R, nh, T, hs).
    """
    R, T = idx.shape
    nh, C = model.config.n_head, model.config.n_embd
    t, wte = model.transformer, model.transformer.wte.weight
    x = F.embedding(idx, wte) + t.wpe.weight[positions].to(wte.dtype)  # (R, T, C)
    for layer, block in enumerate(model.blocks):
        q, k, v = _linear(_norm(x, block.ln_1), block.attn.c_attn).split(C, dim=-1)
        q = q.view(R, T, nh, C // nh).transpose(1, 2)  # (R, nh, T, hs)
        k = k.view(R, T, nh, C // nh).transpose(1, 2)  # (R, nh, T, hs)
        v = v.view(R, T, nh, C // nh).transpose(1, 2)  # (R, nh, T, hs)
        y = attend(layer, q, k, v).transpose(1, 2).reshape(R, T, C)  # (R, T, C)
        x = x + _linear(y, block.attn.c_proj)
        h = F.gelu(_linear(_norm(x, block.ln_2), block.mlp.c_fc), approximate="tanh")  # (R, T, 4C)
        x = x + _linear(h, block.mlp.c_proj)
    return _norm(x, t.ln_f)


class CachedReader:
    """Reads token windows, one a row, and says what may come next.

    The cache is `n_layer` pairs of (rows, nh, capacity, hs) tensors in the weights' type: 36 MiB a row for GPT-2 124M
    at 1,024 tokens in fp32 of keys and as much of values.
    """

    def __init__(self, model: GPT, rows: int, capacity: int) -> None:
        """
        Args:
            model: its weights are read in place; nothing of it is changed.
            rows: windows read side by side.
            capacity: positions kept, at most the model's block_size.
        """
        self.config = model.config
        self.model, self.wte = model, model.transformer.wte.weight
        self.rows = rows
        self.capacity = capacity
        nh, hs = self.config.n_head, self.config.n_embd // self.config.n_head
        shape = (rows, nh, capacity, hs)
        new = (
            self.wte.new_zeros
        )  # zeros, not empty: a NaN left in memory would pass through a masked softmax as 0 * NaN
        self.k = [new(shape) for _ in range(self.config.n_layer)]
        self.v = [new(shape) for _ in range(self.config.n_layer)]

    @torch.no_grad()
    def read(self, rows: Sequence[int], windows: Sequence[Sequence[int]]) -> Tensor:
        """Read whole windows into `rows`, replacing what those rows held.

        Shorter windows are padded on the right: attention is causal, so no token sees the padding, and a later step
        writes over it before any token may look there.

        Returns:
            (len(rows), vocab_size) fp32 logits of the token after each window.
        """
        device = self.wte.device
        T = max(map(len, windows))
        idx = torch.zeros(len(windows), T, dtype=torch.long)  # (R, T)
        for r, window in enumerate(windows):
            idx[r, : len(window)] = torch.tensor(window)
        at = torch.tensor(list(rows), device=device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][at, :, :T] = k
            self.v[layer][at, :, :T] = v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        x = read_at(self.model, idx.to(device), torch.arange(T, device=device), attend)  # (R, T, C)
        last = torch.tensor([len(window) - 1 for window in windows], device=device)
        return self._logits(x[torch.arange(len(windows), device=device), last])

    @torch.no_grad()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one token a row at its position; everything before that position must have been read.

        Returns:
            (rows, vocab_size) fp32 logits of the next tokens.
        """
        device = self.wte.device
        idx = torch.tensor(tokens, device=device).view(self.rows, 1)
        S = max(positions) + 1
        if min(positions) + 1 == S:  # all rows equally long: no mask, and a plain slice to write to

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.k[layer][:, :, S - 1] = k[:, :, 0]
                self.v[layer][:, :, S - 1] = v[:, :, 0]
                return attend_one(q, self.k[layer][:, :, :S], self.v[layer][:, :, :S], None)

            x = read_at(self.model, idx, torch.tensor([S - 1], device=device), attend)
            return self._logits(x[:, 0])
        return self.masked_step(idx, torch.tensor(positions, device=device), S)

    @torch.no_grad()
    def masked_step(self, idx: Tensor, positions: Tensor, S: int) -> Tensor:
        """One token a row, (rows, 1), at positions (rows,) of their own, all below S; (rows, vocab_size) logits. Keys
        beyond a row's position are masked. Never waits for the device."""
        nh, hs = self.k[0].size(1), self.k[0].size(3)
        beyond = torch.arange(S, device=idx.device) > positions.view(-1, 1, 1, 1)  # (rows, 1, 1, S)
        mask = self.wte.new_zeros(self.rows, nh, 1, S).masked_fill_(beyond, -torch.inf)
        where = positions.view(-1, 1, 1, 1).expand(self.rows, nh, 1, hs)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer].scatter_(2, where, k)
            self.v[layer].scatter_(2, where, v)
            return attend_one(q, self.k[layer][:, :, :S], self.v[layer][:, :, :S], mask)

        return self._logits(read_at(self.model, idx, positions.view(-1, 1), attend)[:, 0])

    def _logits(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, vocab_size) in fp32: the padded rows of wte are no tokens."""
        return F.linear(x, self.wte[: self.config.vocab_size]).float()


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query a row and head: q (R, nh, 1, hs), k and v (R, nh, S, hs), mask (R, nh, 1, S) of zeros and
    -inf, or None.

    On a GPU in fp32 as two batched products: torch's kernel for that case gives a head's whole cache to one thread
    block, 1.41 against 0.19 ms for the 12 layers of GPT-2 124M at 1,024 positions on a H100 (torch 2.11).
    """
    if not (q.is_cuda and q.dtype == torch.float32):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    R, nh, S, hs = k.shape
    keys, values = k.view(R * nh, S, hs), v.view(R * nh, S, hs)
    query, scale = q.reshape(R * nh, 1, hs), hs**-0.5
    if mask is None:
        scores = torch.bmm(query, keys.transpose(1, 2)) * scale  # (R nh, 1, S)
    else:
        scores = torch.baddbmm(mask.view(R * nh, 1, S), query, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(R, nh, 1, hs)


def _linear(x: Tensor, module: nn.Linear) -> Tensor:
    return F.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))


def _norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], module.weight.to(x.dtype), module.bias.to(x.dtype), LAYER_NORM_EPS)
