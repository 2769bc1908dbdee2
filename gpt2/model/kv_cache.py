"""Decoding with a key-value cache: one more token costs a forward pass over one position, plus reading the cache.

Runs the blocks of `gpt2.model.gpt.GPT` with another attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.model.gpt import GPT


def forward_with_attention(
    model: GPT, idx: Tensor, positions: Tensor, attention: Callable[[int, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`GPT.hidden` with other positions and another attention: idx (R, T) -> (R, T, C) after the last LayerNorm.

    Calls the blocks' `forward` directly, which skips their compiled versions and FSDP's hooks: decoding changes shapes
    at every token, and may run on a single rank while the weights are gathered.

    Args:
        positions: broadcasts to (R, T).
        attention: (layer, q, k, v), each (R, nh, T, hs) -> (R, nh, T, hs).
    """
    x = model.transformer.wte(idx) + model.transformer.wpe(positions)  # (R, T, C)
    for layer, block in enumerate(model.blocks):
        x = block.forward(x, partial(attention, layer))  # (R, T, C)
    return model.transformer.ln_f(x)


class CachedDecoder:
    """Logits of the next token for several rows, each with its own cached window of tokens.

    The cache is `n_layer` pairs of (rows, nh, capacity, hs) tensors in the weights' type. In fp32, GPT-2 124M needs 36
    MiB of keys and 36 MiB of values per row of 1,024 tokens.

    Args:
        model: its weights are used in place and not changed.
        rows: windows decoded in parallel.
        capacity: positions in the cache, at most the model's block_size.
    """

    def __init__(self, model: GPT, rows: int, capacity: int) -> None:
        self.config = model.config
        self.model, self.wte = model, model.transformer.wte.weight
        self.rows, self.capacity = rows, capacity
        shape = (rows, self.config.n_head, capacity, self.config.n_embd // self.config.n_head)
        # zeros, not empty: a masked softmax turns a NaN in uninitialized memory into 0 * NaN
        self.k = [self.wte.new_zeros(shape) for _ in range(self.config.n_layer)]
        self.v = [self.wte.new_zeros(shape) for _ in range(self.config.n_layer)]

    @torch.no_grad()
    def prefill(self, rows: Sequence[int], windows: Sequence[Sequence[int]]) -> Tensor:
        """Read whole windows into `rows`, replacing their contents.

        Shorter windows are padded on the right: attention is causal, so no token sees the padding, and later steps
        overwrite it before its positions become visible.

        Returns:
            (len(rows), vocab_size) fp32 logits of the token after each window.
        """
        device = self.wte.device
        T = max(map(len, windows))
        idx = torch.zeros(len(windows), T, dtype=torch.long)  # (R, T)
        for r, window in enumerate(windows):
            idx[r, : len(window)] = torch.tensor(window)
        row_index = torch.tensor(list(rows), device=device)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][row_index, :, :T] = k
            self.v[layer][row_index, :, :T] = v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        positions = torch.arange(T, device=device)
        x = forward_with_attention(self.model, idx.to(device), positions, attention)  # (R, T, C)
        last = torch.tensor([len(window) - 1 for window in windows], device=device)
        return self._logits(x[torch.arange(len(windows), device=device), last])

    @torch.no_grad()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one token per row at its position; all earlier positions must be in the cache.

        Returns:
            (rows, vocab_size) fp32 logits of the next tokens.
        """
        device = self.wte.device
        idx = torch.tensor(tokens, device=device).view(self.rows, 1)
        S = max(positions) + 1
        if min(positions) + 1 < S:
            return self.masked_decode(idx, torch.tensor(positions, device=device), S)

        # all rows have the same length: no mask, and writes to a slice
        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][:, :, S - 1] = k[:, :, 0]
            self.v[layer][:, :, S - 1] = v[:, :, 0]
            return single_query_attention(q, self.k[layer][:, :, :S], self.v[layer][:, :, :S], None)

        x = forward_with_attention(self.model, idx, torch.tensor([S - 1], device=device), attention)
        return self._logits(x[:, 0])

    @torch.no_grad()
    def masked_decode(self, idx: Tensor, positions: Tensor, S: int) -> Tensor:
        """`decode` for tokens (rows, 1) at positions (rows,) below S; masks keys after each row's position. Does not
        synchronize with the device."""
        nh, hs = self.k[0].size(1), self.k[0].size(3)
        masked = torch.arange(S, device=idx.device) > positions.view(-1, 1, 1, 1)  # (rows, 1, 1, S)
        mask = self.wte.new_zeros(self.rows, nh, 1, S).masked_fill_(masked, -torch.inf)
        index = positions.view(-1, 1, 1, 1).expand(self.rows, nh, 1, hs)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer].scatter_(2, index, k)
            self.v[layer].scatter_(2, index, v)
            return single_query_attention(q, self.k[layer][:, :, :S], self.v[layer][:, :, :S], mask)

        return self._logits(forward_with_attention(self.model, idx, positions.view(-1, 1), attention)[:, 0])

    def _logits(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, vocab_size) in fp32, without the padded rows of wte."""
        return F.linear(x, self.wte[: self.config.vocab_size]).float()


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query per row and head: q (R, nh, 1, hs), k and v (R, nh, S, hs), mask (R, nh, 1, S) of zeros
    and -inf, or None.

    On a GPU in fp32, two batched products: torch's kernel gives a head's whole cache to one thread block, 1.41 against
    0.19 ms for the 12 layers of GPT-2 124M at 1,024 positions on an H100 (torch 2.11).
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
