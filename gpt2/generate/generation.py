"""Sampling tokens from a model, for one prompt or several in parallel.

Does not use torch's global random state, so sampling during training does not change the training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.generate.cuda_graph import CudaGraphSampler
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import CachedDecoder


@dataclass(frozen=True)
class SamplingParams:
    """How to sample the next token from the logits.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 1.0
    """0 takes the most likely token"""
    top_k: int | None = None
    """restricts to the k most likely tokens"""
    top_p: float | None = None
    """restricts to the most likely tokens whose cumulative probability reaches top_p (nucleus sampling, Holtzman et al.
    2019); applied after top_k, as in Hugging Face's transformers"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature} is not 0 or more: use 0 for greedy, 1 for unscaled sampling"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} leaves no token: use 1 or more, or none for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not in (0, 1]: use 1, or none, for all tokens")

    def sample_token(self, logits: Tensor, u: Tensor) -> Tensor:
        """Sample by inversion of the cumulative distribution.

        Args:
            logits: (R, V).
            u: (R,) float64, uniform in [0, 1), one per row.

        Returns:
            (R,) token ids.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        # limits without effect must not sort the tokens, which would change the token of a given u
        top_k = self.top_k if self.top_k is not None and self.top_k < logits.shape[-1] else None
        top_p = self.top_p if self.top_p is not None and self.top_p < 1 else None
        ids: Tensor | None = None
        if top_k is not None:
            logits, ids = logits.topk(top_k, dim=-1)  # (R, k), most likely first
        elif top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True)  # (R, V)
        # not torch.softmax, which gives a row to one thread block: 39 us for GPT-2's vocabulary on an H100
        exp = ((logits.double() - logits.amax(-1, keepdim=True)) / self.temperature).exp()  # (R, k)
        probs = exp / exp.sum(-1, keepdim=True)
        cdf = probs.cumsum(-1)
        if top_p is not None:
            probs = torch.where(cdf - probs < top_p, probs, 0.0)  # 0 < top_p keeps the most likely token
            cdf = probs.cumsum(-1)
        total = cdf[:, -1:]
        index = torch.searchsorted(cdf, u.view(-1, 1) * total, right=True)  # skips tokens of probability 0
        index = torch.minimum(index, (cdf < total).sum(-1, keepdim=True))  # u * total may round up to total
        return (index if ids is None else ids.gather(-1, index))[:, 0]


class Decoder(Protocol):
    """Gives the logits after windows of tokens; see CachedDecoder."""

    def prefill(self, rows: Sequence[int], windows: Sequence[Sequence[int]]) -> Tensor: ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor: ...


class UncachedDecoder:
    """Runs the model over the whole window for each token: the reference for CachedDecoder, in speed and values."""

    def __init__(self, model: GPT, rows: int) -> None:
        self.model = model
        self.windows: list[list[int]] = [[] for _ in range(rows)]

    @torch.no_grad()
    def prefill(self, rows: Sequence[int], windows: Sequence[Sequence[int]]) -> Tensor:
        for row, window in zip(rows, windows, strict=True):
            self.windows[row] = list(window)
        return torch.stack([self._logits(row) for row in rows])

    @torch.no_grad()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self.windows[row] = [*self.windows[row][:position], token]
        return torch.stack([self._logits(row) for row in range(len(self.windows))])

    def _logits(self, row: int) -> Tensor:
        idx = torch.tensor([self.windows[row]], device=next(self.model.parameters()).device)  # (1, T)
        logits, _ = self.model(idx)
        assert logits is not None
        return logits[0, -1].float()


class Generation:
    """Continues several prompts in parallel. Each iteration gives one token id per row, None for rows that have ended.
    Setting `ended[row]` ends a row.

    The model sees at most block_size tokens; longer prompts lose their beginning. When a window is full, its older half
    is dropped and the newer half is read again from position 0: learned absolute positions prevent shifting the cache,
    and dropping half limits this to once per block_size / 2 tokens.

    Raises:
        UserError: an empty prompt, or a token that is not in the model's vocabulary.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        n_tokens: int,
        sampling: SamplingParams,
        *,
        seeds: Sequence[int],
        stop: Collection[int] = (),
        cache: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        vocab_size, self.block_size = model.config.vocab_size, model.config.block_size
        for prompt in prompts:
            if not prompt:
                raise UserError("a prompt without tokens: begin with <|endoftext|>, token 50256")
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise UserError(f"the prompt has token {max(prompt):,}, the vocabulary ends at {vocab_size - 1:,}")
        self.n_tokens = n_tokens = max(n_tokens, 0)
        self.sampling = sampling
        self.stop = frozenset(stop)
        self.windows = [list(prompt[-self.block_size :]) for prompt in prompts]
        self.ended = [False] * len(prompts)
        self._started = False
        # one CPU generator per row: a row's text depends neither on other rows nor on the device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = [torch.rand(n_tokens, generator=generator, dtype=torch.float64) for generator in generators]
        empty = torch.empty(n_tokens, 0, dtype=torch.float64)
        self.uniforms = torch.stack(draws, dim=1) if draws else empty  # (n_tokens, R)
        capacity = min(self.block_size, max(map(len, self.windows), default=1) + n_tokens)
        self.decoder: Decoder
        self.graph_sampler: CudaGraphSampler | None = None
        if cache:
            self.decoder = CachedDecoder(model, len(prompts), capacity)
            if cuda_graph and n_tokens > 1 and prompts and self.decoder.wte.is_cuda:
                self.graph_sampler = CudaGraphSampler(self.decoder, sampling.sample_token, self.uniforms)
        else:
            self.decoder = UncachedDecoder(model, len(prompts))

    def __iter__(self) -> Iterator[list[int | None]]:
        if self._started:
            raise RuntimeError("a Generation can be iterated once: its windows and cache have changed")
        self._started = True
        if not self.n_tokens or not self.windows:
            return
        tokens = self._sample(self.decoder.prefill(range(len(self.windows)), self.windows), 0)
        for step in range(1, self.n_tokens + 1):
            yield [None if ended else token for token, ended in zip(tokens, self.ended, strict=True)]
            self.ended = [ended or token in self.stop for token, ended in zip(tokens, self.ended, strict=True)]
            if all(self.ended) or step == self.n_tokens:
                return
            positions, full = self._append(tokens)
            if self.graph_sampler is not None and not full:
                tokens = self.graph_sampler.next_tokens(tokens, positions, step)
            else:
                tokens = self._sample(self._decode(tokens, positions, full), step)

    def _sample(self, logits: Tensor, step: int) -> list[int]:
        tokens: list[int] = self.sampling.sample_token(logits, self.uniforms[step].to(logits.device)).tolist()
        return tokens

    def _append(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Append a token to the window of each row that has not ended.

        Returns:
            Each row's position of its token, 0 (unused) for rows that have ended or were full; and the rows that were
            full, whose windows have lost their older half.
        """
        full = []
        positions = [0] * len(tokens)
        for row, (window, token) in enumerate(zip(self.windows, tokens, strict=True)):
            if self.ended[row]:
                continue
            window.append(token)
            if len(window) > self.block_size:
                del window[: len(window) - max(1, self.block_size // 2)]
                full.append(row)
            else:
                positions[row] = len(window) - 1
        return positions, full

    def _decode(self, tokens: list[int], positions: list[int], full: list[int]) -> Tensor:
        """(R, V) logits after what `_append` appended; undefined for rows that have ended."""
        if full and len(full) == len(tokens):
            return self.decoder.prefill(full, self.windows)
        logits = self.decoder.decode(tokens, positions)
        if full:
            refilled = self.decoder.prefill(full, [self.windows[row] for row in full])
            logits = logits.index_copy(0, torch.tensor(full, device=logits.device), refilled)
        return logits


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
    cache: bool = True,
) -> list[int]:
    """Continue `prompt_ids` by up to `n_tokens` tokens.

    Args:
        stop: ids that end the text; the result includes the one that occurred.
        cache: False runs the model over the whole window for each token: the same text, many times slower.

    Returns:
        The new ids, without the prompt.

    Raises:
        UserError: an empty prompt, a token outside the vocabulary, or temperature, top_k or top_p out of range.
    """
    sampling = SamplingParams(temperature, top_k, top_p)
    generation = Generation(model, [prompt_ids], n_tokens, sampling, seeds=[seed], stop=stop, cache=cache)
    return [token for (token,) in generation if token is not None]
