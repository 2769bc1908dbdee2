"""One token of GPT-2 for a few rows, in five kernels a layer: sampling has to read all weights for each token, and
nothing else should cost much beside.

torch's operators take about twenty kernels a layer for it, most of which do next to nothing for two or three
microseconds. Here each matrix product takes along what stands before it (LayerNorm, the last step of attention) and
behind it (bias, GELU, the residual, the way into the cache). Everything is fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton kernels are pointers and numbers of its own)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.kernels.gelu import gelu
from gpt2.kernels.layer_norm import normalised
from gpt2.kernels.triton_or_none import tl, triton, usable
from gpt2.model.gpt import LAYER_NORM_EPS
from gpt2.model.kv_cache import CachedReader

MOST_ROWS = 4
"""with more, the products are better made by a library: here each row is a pass over registers"""
CHUNK = 128
"""keys that one program of attention reads"""


def fits(reader: CachedReader) -> bool:
    """Whether `FewRows` can stand in for the reader's own step."""
    hs = reader.k[0].size(3)
    return usable(reader.wte) and reader.wte.dtype == torch.float32 and reader.rows <= MOST_ROWS and hs & (hs - 1) == 0


def tile(N: int, block_k: int) -> tuple[int, int]:
    """Outputs and warps of one program that makes some of N outputs from block_k inputs."""
    block_n = 16 if 16 * block_k < N else 4 if block_k <= 2048 else 2
    return block_n, 8 if block_n * block_k > 4096 else 4


class FewRows:
    """Reads one token a row, into the cache of `reader` and over its weights."""

    def __init__(self, reader: CachedReader) -> None:
        rows, nh, capacity, hs = reader.k[0].shape
        self.reader = reader
        self.chunks = triton.cdiv(capacity, CHUNK)
        new = reader.wte.new_empty
        self.q, self.h = new(rows, nh * hs), new(rows, 4 * nh * hs)
        self.most, self.total = new(rows * nh, self.chunks), new(rows * nh, self.chunks)
        self.part = new(rows * nh, self.chunks, hs)
        self.logits = new(rows, reader.config.vocab_size)

    def step(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Logits (rows, vocab_size) of what follows idx (rows,) at positions (rows,); valid until the next call."""
        reader = self.reader
        t = reader.model.transformer
        rows, nh, capacity, hs = reader.k[0].shape
        x = F.embedding(idx, t.wte.weight) + F.embedding(positions, t.wpe.weight)  # (rows, C)
        for layer, block in enumerate(reader.model.blocks):
            k, v = reader.k[layer], reader.v[layer]
            self._linear(x, block.attn.c_attn, self.q, norm=block.ln_1, cache=(k, v, positions))
            _attend[(rows * nh, self.chunks)](
                self.q, k, v, positions, self.most, self.total, self.part, hs**-0.5, capacity, nh,
                HS=hs, CHUNK=CHUNK, CHUNKS=self.chunks, num_warps=4,
            )  # fmt: skip
            self._linear(self.q, block.attn.c_proj, x, attended=True)
            self._linear(x, block.mlp.c_fc, self.h, norm=block.ln_2, gelu=True)
            self._linear(self.h, block.mlp.c_proj, x)
        self._linear(x, t.wte, self.logits, norm=t.ln_f)
        return self.logits

    def _linear(
        self,
        x: Tensor,
        layer: Any,
        out: Tensor,
        *,
        norm: Any = None,
        attended: bool = False,
        gelu: bool = False,
        cache: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """out = layer(x), with what the kernel's arguments say; added to `out` if nothing but a bias is asked for."""
        weight, bias = layer.weight, getattr(layer, "bias", None)
        rows, nh, capacity, hs = self.reader.k[0].shape
        N, K = (out.size(1) if bias is None else weight.size(0)), weight.size(1)
        block_k = triton.next_power_of_2(K)
        block_n, warps = tile(N, block_k)
        k, v, positions = cache or (x, x, x)
        _product[(triton.cdiv(N, block_n),)](
            x, weight, weight if bias is None else bias, out, x if norm is None else norm.weight,
            x if norm is None else norm.bias, k, v, positions, self.most, self.total, self.part, N, K,
            capacity, nh, LAYER_NORM_EPS, ROWS=rows, HS=hs, BLOCK_N=block_n, BLOCK_K=block_k, BIAS=bias is not None,
            NORM=norm is not None, ATTENDED=attended, GELU=gelu, CACHE=cache is not None,
            ADD=bias is not None and norm is None, CHUNKS=self.chunks, num_warps=warps,
        )  # fmt: skip


@triton.jit
def _product(
    x, w, b, out, norm_w, norm_b, k_cache, v_cache, positions, most, total, part, N, K, capacity, nh, eps,
    ROWS: tl.constexpr, HS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ATTENDED: tl.constexpr, GELU: tl.constexpr, CACHE: tl.constexpr, ADD: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of every row: w (N, K) read once, b (N,).

    The input is x (ROWS, K), LayerNorm of it with NORM, or with ATTENDED what `_attend` left in pieces. The output goes
    through GELU, is added to what is there with ADD, and with CACHE is q, k and v: q goes to `out`, k and v into the
    caches.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_n, in_k = n < N, k < K
    at = n[:, None].to(tl.int64) * K + k[None, :]
    weights = tl.load(w + at, mask=in_n[:, None] & in_k[None, :], other=0.0)  # (BLOCK_N, BLOCK_K)
    if BIAS:
        bias = tl.load(b + n, mask=in_n, other=0.0)
    if NORM:
        scale = tl.load(norm_w + k, mask=in_k, other=0.0)
        shift = tl.load(norm_b + k, mask=in_k, other=0.0)
    for r in tl.static_range(ROWS):
        if ATTENDED:
            piece = (r * nh + k // HS) * CHUNKS
            top = tl.load(most + piece, mask=in_k, other=0.0)
            for c in tl.static_range(1, CHUNKS):
                top = tl.maximum(top, tl.load(most + piece + c, mask=in_k, other=0.0))
            above = tl.zeros([BLOCK_K], tl.float32)
            below = tl.zeros([BLOCK_K], tl.float32)
            for c in tl.static_range(CHUNKS):
                share = tl.exp(tl.load(most + piece + c, mask=in_k, other=0.0) - top)
                below += share * tl.load(total + piece + c, mask=in_k, other=1.0)
                above += share * tl.load(part + (piece + c) * HS + k % HS, mask=in_k, other=0.0)
            row = above / below
        else:
            row = tl.load(x + r * K + k, mask=in_k, other=0.0)
        if NORM:
            row, _, _ = normalised(row, in_k, K, eps)
            row = row * scale + shift
        y = tl.sum(weights * row[None, :], axis=1)
        if BIAS:
            y += bias
        if GELU:
            y = gelu(y)
        if ADD:
            y += tl.load(out + r * N + n, mask=in_n, other=0.0)
        if CACHE:
            C = nh * HS
            place = tl.load(positions + r)
            which, c = n // C, n % C
            there = ((r * nh + c // HS) * capacity + place) * HS + c % HS
            tl.store(out + r * C + c, y, mask=in_n & (which == 0))
            tl.store(k_cache + there, y, mask=in_n & (which == 1))
            tl.store(v_cache + there, y, mask=in_n & (which == 2))
        else:
            tl.store(out + r * N + n, y, mask=in_n)


@triton.jit
def _attend(
    q, k_cache, v_cache, positions, most, total, part, scale, capacity, nh, HS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """One query over CHUNK keys of one head and row: the largest score, the sum of the exponentials against it, and the
    values summed with those as weights. A chunk past the row's position leaves -inf, 0 and 0."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    place = tl.load(positions + head // nh)
    key, d = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, HS)
    seen = key <= place
    at = (head.to(tl.int64) * capacity + key)[:, None] * HS + d[None, :]
    query = tl.load(q + head * HS + d)
    keys = tl.load(k_cache + at, mask=seen[:, None], other=0.0)
    values = tl.load(v_cache + at, mask=seen[:, None], other=0.0)
    scores = tl.where(seen, tl.sum(keys * query[None, :], axis=1) * scale, float("-inf"))
    top = tl.max(scores, axis=0)
    share = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top))
    tl.store(most + head * CHUNKS + chunk, top)
    tl.store(total + head * CHUNKS + chunk, tl.sum(share, axis=0))
    tl.store(part + (head * CHUNKS + chunk) * HS + d, tl.sum(values * share[:, None], axis=0))
