"""Which tokens a step trains on: a pure function of the seed and the step.

All training shards are one stream of tokens, cut into sequences. Position g of the run (step * sequences_per_step +
place in the step) is sequence `permutation(seed, epoch)[g % n]` of epoch g // n. Nothing is remembered between steps,
so resuming is asking for another step, and neither the number of processes nor the micro-batch changes the order.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2.atomic import atomic_write
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.shards import Tokens, open_shard
from gpt2.tokenizer import EOT

ROUNDS = 6
SCAN_TOKENS = 1 << 24  # looked at at once when document starts are sought


# -------------------------------------------------------------------------------------------------------- permutation


def permute(index: NDArray[np.uint64], n: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """Where `index` (values below n) goes in a pseudo-random permutation of 0..n-1 that is never held in memory.

    A Feistel network is a bijection of 0..4^k-1 whatever its round function is; values that land at or past n are sent
    through it again until they do not ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains,
    2002). 4^k is below 4 n, so that takes under four passes on average.
    """
    half = max(1, -(-(n - 1).bit_length() // 2))  # bits of each half: 4^half >= n
    keys = _mix(np.arange(1, ROUNDS + 1, dtype=np.uint64) ^ _mix(_word(seed) ^ _mix(_word(epoch))))
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    values = index.copy()
    walking = np.ones(len(values), dtype=bool)
    while walking.any():
        left, right = values[walking] >> shift, values[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[walking] = left << shift | right
        walking = values >= n
    return values


def _word(value: int) -> NDArray[np.uint64]:
    return np.array([value % (1 << 64)], dtype=np.uint64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of x reaches every bit of the result."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ------------------------------------------------------------------------------------------------------------- stream


class TokenStream:
    """Several shards as one long array of tokens, mapped from their files.

    Raises:
        UserError: a shard is missing or damaged.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards: list[Tokens] = [open_shard(path) for path in shards]
        self.ends = list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, n: int) -> Tokens:
        """Tokens start..start+n-1, across shard borders: (n,) uint16."""
        parts = []
        shard = bisect_right(self.ends, start)
        while n:
            first = start - (self.ends[shard] - len(self.shards[shard]))
            parts.append(self.shards[shard][first : first + n])
            start, n, shard = start + len(parts[-1]), n - len(parts[-1]), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def aligned_starts(stream: TokenStream, T: int) -> NDArray[np.int64]:
    """Where sequences begin when each must begin at a document: the first document, then always the first one that
    begins T or more tokens after the last start. No token is in two sequences; the end of a document that a sequence
    cuts off is in none."""
    starts = array("q")
    free = base = 0
    for shard in stream.shards:
        for low in range(0, len(shard), SCAN_TOKENS):
            documents = base + low + np.flatnonzero(shard[low : low + SCAN_TOKENS] == EOT)
            at = int(np.searchsorted(documents, free))
            while at < len(documents):
                starts.append(int(documents[at]))
                free = starts[-1] + T
                at = int(np.searchsorted(documents, free))
        base += len(shard)
    if starts and starts[-1] + T >= len(stream):  # the last one may not be whole
        starts.pop()
    return np.array(starts, dtype=np.int64)


def write_aligned_starts(shards: Sequence[Path], T: int, path: Path, world: World) -> None:
    """Find the aligned starts, once for a run, and keep them in `path` (.npy): the whole stream has to be looked at.

    Rank 0 does it and the others wait at the store: a collective would time out where the stream is long.
    """
    if not world.is_main:
        world.wait_for(path.name)
        return
    if not path.exists():
        with atomic_write(path) as file:
            np.save(file, aligned_starts(TokenStream(shards), T), allow_pickle=False)
    world.publish(path.name)


# ------------------------------------------------------------------------------------------------------------- loader


class Batch(NamedTuple):
    idx: Tensor
    """(B, T) int64"""
    targets: Tensor
    """(B, T) int64, the token after each"""


class Loader:
    """Batches addressed by step.

    Args:
        shards: the training shards, in reading order.
        T: tokens of a sequence; one more is read, to be predicted.
        vocab_size: tokens at or past it are refused.
        starts: .npy file of `write_aligned_starts`; None: sequence i begins at token i * T.
        shuffle: a fresh permutation of all sequences each epoch; else the order of the files.

    Raises:
        UserError: not one sequence can be had, or a shard is damaged.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        T: int,
        sequences_per_step: int,
        seed: int,
        vocab_size: int,
        *,
        shuffle: bool = True,
        starts: Path | None = None,
    ) -> None:
        self.stream = TokenStream(shards)
        self.T, self.sequences_per_step, self.seed, self.shuffle = T, sequences_per_step, seed, shuffle
        self.vocab_size = vocab_size
        self.starts = None if starts is None else np.load(starts, mmap_mode="r", allow_pickle=False)
        self.n_sequences = (len(self.stream) - 1) // T if self.starts is None else len(self.starts)
        if self.n_sequences < 1:
            raise UserError(
                f"the training shards hold {len(self.stream):,} tokens, one sequence needs {T + 1:,}"
                f"{' from a document start on' if starts else ''}: get more text or lower train.model.block_size"
            )

    def sequences(self, step: int) -> NDArray[np.int64]:
        """Numbers of the sequences of one step over all processes, in order: (sequences_per_step,)."""
        g = step * self.sequences_per_step + np.arange(self.sequences_per_step)
        epochs, index = np.divmod(g, self.n_sequences)
        if self.shuffle:
            for epoch in np.unique(epochs):  # a step may end one epoch and begin the next
                inside = epochs == epoch
                index[inside] = permute(index[inside].astype(np.uint64), self.n_sequences, self.seed, int(epoch))
        return index

    def sequence(self, number: int) -> Tokens:
        """The T + 1 tokens of one sequence: (T + 1,) uint16."""
        start = number * self.T if self.starts is None else int(self.starts[number])
        return self.stream.read(start, self.T + 1)

    def batch(self, step: int, part: slice) -> Batch:
        """The sequences at the places `part` of a step.

        Raises:
            UserError: a token that the vocabulary does not have.
        """
        tokens = np.stack([self.sequence(int(number)) for number in self.sequences(step)[part]]).astype(np.int64)
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise UserError(
                f"the training shards hold token {largest:,}, the model's vocabulary ends at {self.vocab_size - 1:,}: "
                f"they were made with another tokenizer"
            )
        data = torch.from_numpy(tokens)
        return Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous())


def places(sequences_per_step: int, size: int, micro_batch_size: int, rank: int) -> list[slice]:
    """Which places of a step this process works on, one slice a micro-step, each of micro_batch_size or fewer.

    Where the numbers do not divide, some slices are one shorter, or a process has one slice less.
    """
    own = range(rank * sequences_per_step // size, (rank + 1) * sequences_per_step // size)
    most = -(-sequences_per_step // size)  # that any process has
    micro_steps = -(-most // micro_batch_size)
    cuts = [own.start + i * len(own) // micro_steps for i in range(micro_steps + 1)]
    return [slice(low, high) for low, high in pairwise(cuts) if low < high]


class Prefetcher:
    """Reads the next micro-batch in a thread while this one is worked on, and sends it on its way to the device."""

    def __init__(self, loader: Loader, parts: list[slice], device: torch.device) -> None:
        self.loader, self.parts, self.device = loader, parts, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._expected = (-1, 0)
        self._next: Future[Batch] | None = None

    def step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of one step, on the device."""
        if self._expected != (step, 0):
            self._submit(step, 0)
        for micro in range(len(self.parts)):
            assert self._next is not None
            batch = self._next.result()
            self._submit(*((step, micro + 1) if micro + 1 < len(self.parts) else (step + 1, 0)))
            yield Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def _submit(self, step: int, micro: int) -> None:
        self._expected = (step, micro)
        self._next = self._pool.submit(self._read, step, self.parts[micro])

    def _read(self, step: int, part: slice) -> Batch:
        batch = self.loader.batch(step, part)
        return Batch(*(t.pin_memory() for t in batch)) if self.device.type == "cuda" else batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
