"""Choosing tokens from a model, one after the other, for one prompt or many side by side.

Nothing here touches torch's global random state, so sampling during training leaves the training as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.generate.cuda_graph import RecordedSteps
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import CachedReader

F64 = torch.float64


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from the logits."""

    temperature: float = 1.0
    """0 takes the likeliest token"""
    top_k: int | None = None
    """only the so many likeliest tokens"""
    top_p: float | None = None
    """only the likeliest tokens that together reach this probability (nucleus sampling, Holtzman et al. 2019);
    after top_k, as in Hugging Face's order"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature} is not 0 or more: 0 takes the likeliest, 1 samples as trained"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} leaves no token: use 1 or more, or none for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not in (0, 1]: use 1, or none, for all tokens")

    def pick(self, logits: Tensor, u: Tensor) -> Tensor:
        """Choose by inverse cumulative distribution.

        Args:
            logits: (R, V).
            u: (R,) float64, uniform in [0, 1), one for each row.

        Returns:
            (R,) token ids.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        # limits that limit nothing must not change which token a u stands for: sorted tokens lie elsewhere in the cdf
        top_k = self.top_k if self.top_k is not None and self.top_k < logits.shape[-1] else None
        top_p = self.top_p if self.top_p is not None and self.top_p < 1 else None
        ids: Tensor | None = None
        if top_k is not None:
            logits, ids = logits.topk(top_k, dim=-1)  # (R, k), likeliest first
        elif top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True)  # (R, V)
        # not torch.softmax: that gives a row to one thread block of a GPU, 39 us for GPT-2's vocabulary on a H100
        likeness = ((logits.double() - logits.amax(-1, keepdim=True)) / self.temperature).exp()  # (R, k)
        p = likeness / likeness.sum(-1, keepdim=True)
        cdf = p.cumsum(-1)
        if top_p is not None:
            p = torch.where(cdf - p < top_p, p, 0.0)  # the likeliest token always stays: 0 < top_p
            cdf = p.cumsum(-1)
        total = cdf[:, -1:]
        chosen = torch.searchsorted(cdf, u.view(-1, 1) * total, right=True)  # never a token of probability 0
        chosen = torch.minimum(chosen, (cdf < total).sum(-1, keepdim=True))  # u * total may round up to total
        return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


class Reader(Protocol):
    """Reads windows of tokens and says what may come next; see CachedReader."""

    def read(self, rows: Sequence[int], windows: Sequence[Sequence[int]]) -> Tensor: ...

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor: ...


class RecomputingReader:
    """The plain way: the model's own forward pass over the whole window for each token. Kept as the measure of the
    cached way, in time and in value."""

    def __init__(self, model: GPT, rows: int) -> None:
        self.model = model
        self.windows: list[list[int]] = [[] for _ in range(rows)]

    @torch.no_grad()
    def read(self, rows: Sequence[int], windows: Sequence[Sequence[int]]) -> Tensor:
        for row, window in zip(rows, windows, strict=True):
            self.windows[row] = list(window)
        return torch.stack([self._logits(row) for row in rows])

    @torch.no_grad()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self.windows[row] = [*self.windows[row][:position], token]
        return torch.stack([self._logits(row) for row in range(len(self.windows))])

    def _logits(self, row: int) -> Tensor:
        idx = torch.tensor([self.windows[row]], device=next(self.model.parameters()).device)  # (1, T)
        logits, _ = self.model(idx)
        assert logits is not None
        return logits[0, -1].float()


class Generation:
    """Several prompts continued side by side, one token each a step. Iterating gives, a step, one id for each row,
    None for a row that has ended; setting `ended[row]` ends one from outside.

    The model sees at most block_size tokens. A longer prompt keeps its end. When a window is full, its older half is
    dropped and the newer half read again at positions from 0 on: positions are learned and absolute, so a cache cannot
    be shifted, and dropping half makes reading again rare: once in block_size / 2 tokens.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        n_tokens: int,
        choice: Choice,
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
                raise UserError(f"the prompt has token {max(prompt):,}, the model knows 0 to {vocab_size - 1:,}")
        self.n_tokens = n_tokens = max(n_tokens, 0)
        self.choice = choice
        self.stop = frozenset(stop)
        self.windows = [list(prompt[-self.block_size :]) for prompt in prompts]
        self.ended = [False] * len(prompts)
        self._begun = False
        # one generator a row, on the CPU: a row's text depends neither on its neighbours nor on the device's generator
        dice = [torch.rand(n_tokens, generator=torch.Generator().manual_seed(seed), dtype=F64) for seed in seeds]
        self.dice = torch.stack(dice, dim=1) if dice else torch.empty(n_tokens, 0, dtype=F64)  # (n_tokens, R)
        capacity = min(self.block_size, max(map(len, self.windows), default=1) + n_tokens)
        self.reader: Reader
        self.recorded: RecordedSteps | None = None
        if cache:
            self.reader = CachedReader(model, len(prompts), capacity)
            if cuda_graph and n_tokens > 1 and prompts and self.reader.wte.is_cuda:
                self.recorded = RecordedSteps(self.reader, choice.pick, self.dice)
        else:
            self.reader = RecomputingReader(model, len(prompts))

    def __iter__(self) -> Iterator[list[int | None]]:
        if self._begun:
            raise RuntimeError("a generation is read once: its windows and its cache have moved on")
        self._begun = True
        if not self.n_tokens or not self.windows:
            return
        chosen = self._pick(self.reader.read(range(len(self.windows)), self.windows), 0)
        for turn in range(1, self.n_tokens + 1):
            yield [None if ended else token for token, ended in zip(chosen, self.ended, strict=True)]
            self.ended = [ended or token in self.stop for token, ended in zip(chosen, self.ended, strict=True)]
            if all(self.ended) or turn == self.n_tokens:
                return
            positions, full = self._append(chosen)
            if self.recorded is not None and not full:
                chosen = self.recorded.after(chosen, positions, turn)
            else:
                chosen = self._pick(self._read(chosen, positions, full), turn)

    def _pick(self, logits: Tensor, turn: int) -> list[int]:
        found: list[int] = self.choice.pick(logits, self.dice[turn].to(logits.device)).tolist()
        return found

    def _append(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Put a token at the end of each window that goes on.

        Returns:
            where each row's token stands, 0 where nobody will look at it: in rows that have ended or were full; and the
            rows that were full, whose windows have lost their older half.
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

    def _read(self, tokens: list[int], positions: list[int], full: list[int]) -> Tensor:
        """Read what `_append` appended; (R, V) logits, of no meaning for rows that have ended."""
        if full and len(full) == len(tokens):
            return self.reader.read(full, self.windows)
        logits = self.reader.step(tokens, positions)
        if full:
            logits = logits.index_copy(
                0,
                torch.tensor(full, device=logits.device),
                self.reader.read(full, [self.windows[row] for row in full]),
            )
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
        stop: ids after which it ends; the one met is the last of the result.
        cache: False recomputes the whole window for each token; the same text, many times slower.

    Returns:
        The new ids, without the prompt.

    Raises:
        UserError: an empty prompt, a token that the model does not know, a temperature, top_k or top_p out of range.
    """
    choice = Choice(temperature, top_k, top_p)
    generation = Generation(model, [prompt_ids], n_tokens, choice, seeds=[seed], stop=stop, cache=cache)
    return [token for (token,) in generation if token is not None]
