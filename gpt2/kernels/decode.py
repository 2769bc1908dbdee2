"""One decoding step of GPT-2 for up to 4 rows in five kernels per layer, in fp32.

This forward pass exists for speed: 0.43 instead of 0.88 ms per token (docs/speed.md). A step is bound by reading all
weights once, but torch's operators launch about twenty kernels per layer, each for 2 to 3 microseconds.
Here each matrix product includes its prologue (LayerNorm, the last step of attention) and its epilogue (bias, GELU,
residual, writing to the cache).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of Triton kernels are Triton's own types)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.kernels.gelu import gelu
from gpt2.kernels.layer_norm import normalize
from gpt2.kernels.triton_or_none import tl, triton, usable
from gpt2.model.gpt import LAYER_NORM_EPS
from gpt2.model.kv_cache import CachedDecoder

MAX_ROWS = 4
"""for more rows a library's products are faster: each row here is a pass over registers"""
CHUNK = 128
"""keys per program of attention"""


def is_supported(decoder: CachedDecoder) -> bool:
    """Whether `FusedDecoder` can replace `decoder.masked_decode`."""
    hs, wte = decoder.k[0].size(3), decoder.wte
    return usable(wte) and wte.dtype == torch.float32 and decoder.rows <= MAX_ROWS and hs & (hs - 1) == 0


def tile_shape(N: int, block_k: int) -> tuple[int, int]:
    """(BLOCK_N, warps) of a program that computes BLOCK_N of N outputs from block_k inputs."""
    block_n = 16 if 16 * block_k < N else 4 if block_k <= 2048 else 2
    return block_n, 8 if block_n * block_k > 4096 else 4


class FusedDecoder:
    """Decodes one token per row with the weights and the cache of a `CachedDecoder`."""

    def __init__(self, decoder: CachedDecoder) -> None:
        rows, nh, capacity, hs = decoder.k[0].shape
        self.decoder = decoder
        self.chunks = triton.cdiv(capacity, CHUNK)
        new = decoder.wte.new_empty
        self.q, self.h = new(rows, nh * hs), new(rows, 4 * nh * hs)
        self.chunk_max, self.chunk_sum = new(rows * nh, self.chunks), new(rows * nh, self.chunks)
        self.chunk_v = new(rows * nh, self.chunks, hs)
        self.logits = new(rows, decoder.config.vocab_size)

    def decode(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Logits (rows, vocab_size) of the tokens after idx (rows,) at positions (rows,); the next call overwrites
        them."""
        decoder = self.decoder
        t = decoder.model.transformer
        rows, nh, capacity, hs = decoder.k[0].shape
        x = F.embedding(idx, t.wte.weight) + F.embedding(positions, t.wpe.weight)  # (rows, C)
        for layer, block in enumerate(decoder.model.blocks):
            k, v = decoder.k[layer], decoder.v[layer]
            self._linear(x, block.attn.c_attn, self.q, norm=block.ln_1, cache=(k, v, positions))
            _attention_chunk[(rows * nh, self.chunks)](
                self.q, k, v, positions, self.chunk_max, self.chunk_sum, self.chunk_v, hs**-0.5, capacity, nh,
                HS=hs, CHUNK=CHUNK, CHUNKS=self.chunks, num_warps=4,
            )  # fmt: skip
            self._linear(self.q, block.attn.c_proj, x, combine=True)
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
        combine: bool = False,
        gelu: bool = False,
        cache: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Launch `_linear_kernel` for out = layer(x); adds to `out` if the layer has a bias and there is no `norm`."""
        weight, bias = layer.weight, getattr(layer, "bias", None)
        rows, nh, capacity, hs = self.decoder.k[0].shape
        N, K = (out.size(1) if bias is None else weight.size(0)), weight.size(1)
        block_k = triton.next_power_of_2(K)
        block_n, warps = tile_shape(N, block_k)
        k, v, positions = cache or (x, x, x)
        _linear_kernel[(triton.cdiv(N, block_n),)](
            x, weight, weight if bias is None else bias, out, x if norm is None else norm.weight,
            x if norm is None else norm.bias, k, v, positions, self.chunk_max, self.chunk_sum, self.chunk_v, N, K,
            capacity, nh, LAYER_NORM_EPS, ROWS=rows, HS=hs, BLOCK_N=block_n, BLOCK_K=block_k, BIAS=bias is not None,
            NORM=norm is not None, COMBINE=combine, GELU=gelu, CACHE=cache is not None,
            ADD=bias is not None and norm is None, CHUNKS=self.chunks, num_warps=warps,
        )  # fmt: skip


@triton.jit
def _linear_kernel(
    x, w, b, out, norm_w, norm_b, k_cache, v_cache, positions, chunk_max, chunk_sum, chunk_v, N, K, capacity, nh, eps,
    ROWS: tl.constexpr, HS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, COMBINE: tl.constexpr, GELU: tl.constexpr, CACHE: tl.constexpr, ADD: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs of every row, reading w (N, K) once; b (N,).

    The input is x (ROWS, K); with NORM its LayerNorm; with COMBINE the output of `_attention_chunk`, combined over the
    chunks. With GELU, the output is gelu of the product. With ADD, it is added to `out`. With CACHE, it is q, k and v:
    q goes to `out`, k and v to the caches.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_n, in_k = n < N, k < K
    offsets = n[:, None].to(tl.int64) * K + k[None, :]
    weights = tl.load(w + offsets, mask=in_n[:, None] & in_k[None, :], other=0.0)  # (BLOCK_N, BLOCK_K)
    if BIAS:
        bias = tl.load(b + n, mask=in_n, other=0.0)
    if NORM:
        scale = tl.load(norm_w + k, mask=in_k, other=0.0)
        shift = tl.load(norm_b + k, mask=in_k, other=0.0)
    for r in tl.static_range(ROWS):
        if COMBINE:
            first = (r * nh + k // HS) * CHUNKS
            max_score = tl.load(chunk_max + first, mask=in_k, other=0.0)
            for c in tl.static_range(1, CHUNKS):
                max_score = tl.maximum(max_score, tl.load(chunk_max + first + c, mask=in_k, other=0.0))
            numerator = tl.zeros([BLOCK_K], tl.float32)
            denominator = tl.zeros([BLOCK_K], tl.float32)
            for c in tl.static_range(CHUNKS):
                weight = tl.exp(tl.load(chunk_max + first + c, mask=in_k, other=0.0) - max_score)
                denominator += weight * tl.load(chunk_sum + first + c, mask=in_k, other=1.0)
                numerator += weight * tl.load(chunk_v + (first + c) * HS + k % HS, mask=in_k, other=0.0)
            row = numerator / denominator
        else:
            row = tl.load(x + r * K + k, mask=in_k, other=0.0)
        if NORM:
            row, _, _ = normalize(row, in_k, K, eps)
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
            position = tl.load(positions + r)
            part, c = n // C, n % C
            cache_offsets = ((r * nh + c // HS) * capacity + position) * HS + c % HS
            tl.store(out + r * C + c, y, mask=in_n & (part == 0))
            tl.store(k_cache + cache_offsets, y, mask=in_n & (part == 1))
            tl.store(v_cache + cache_offsets, y, mask=in_n & (part == 2))
        else:
            tl.store(out + r * N + n, y, mask=in_n)


@triton.jit
def _attention_chunk(
    q, k_cache, v_cache, positions, chunk_max, chunk_sum, chunk_v, scale, capacity, nh, HS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One query over CHUNK keys of one head and row: the largest score, the sum of exponentials relative to it, and the
    sum of values weighted by them. A chunk after the row's position gives -inf, 0 and 0."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + head // nh)
    key, d = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, HS)
    visible = key <= position
    offsets = (head.to(tl.int64) * capacity + key)[:, None] * HS + d[None, :]
    query = tl.load(q + head * HS + d)
    keys = tl.load(k_cache + offsets, mask=visible[:, None], other=0.0)
    values = tl.load(v_cache + offsets, mask=visible[:, None], other=0.0)
    scores = tl.where(visible, tl.sum(keys * query[None, :], axis=1) * scale, float("-inf"))
    max_score = tl.max(scores, axis=0)
    weight = tl.exp(scores - tl.where(max_score == float("-inf"), 0.0, max_score))
    tl.store(chunk_max + head * CHUNKS + chunk, max_score)
    tl.store(chunk_sum + head * CHUNKS + chunk, tl.sum(weight, axis=0))
    tl.store(chunk_v + (head * CHUNKS + chunk) * HS + d, tl.sum(values * weight[:, None], axis=0))
