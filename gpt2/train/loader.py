"""The tokens of a step are a pure function of the seed and the step.

All training shards form one stream of tokens, cut into n sequences. Position g of the run (step * sequences_per_step +
position in the step) is sequence `permutation(seed, epoch)[g % n]` of epoch g // n. The loader has no state, so a
resume needs only the step, and the order does not depend on the number of ranks or the micro-batch size.
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
SCAN_TOKENS = 1 << 24  # tokens scanned at once for document starts


# -------------------------------------------------------------------------------------------------------- permutation


def permute(index: NDArray[np.uint64], n: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """Image of `index` (values below n) under a pseudo-random permutation of 0..n-1, computed without a table.

    A Feistel network is a bijection of 0..4^k-1 for any round function; values of n or more go through it again
    ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). 4^k < 4 n, so this takes under
    four passes on average.
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
    """Several memory-mapped shards as one array of tokens.

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
    """Start positions of sequences that each begin at a document start: the first document, then repeatedly the first
    document T or more tokens after the last start. Sequences do not overlap; the rest of a document that a sequence
    cuts off is not used."""
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
    if starts and starts[-1] + T >= len(stream):  # the last sequence may be incomplete
        starts.pop()
    return np.array(starts, dtype=np.int64)


def write_aligned_starts(shards: Sequence[Path], T: int, path: Path, world: World) -> None:
    """Scan the stream for aligned starts, once per run, and write them to `path` (.npy).

    Rank 0 scans; the other ranks wait for a key in the store, because a collective would time out on a long stream.
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
    """Batches indexed by step.

    Args:
        shards: the training shards, in reading order.
        T: tokens per sequence; T + 1 are read, for the targets.
        vocab_size: larger token ids are an error.
        starts: .npy file of `write_aligned_starts`; None: sequence i begins at token i * T.
        shuffle: permute all sequences, differently in each epoch; else the order of the files.

    Raises:
        UserError: the shards are shorter than one sequence, or damaged.
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
                f"{' after a document start' if starts else ''}: add text or lower train.model.block_size"
            )

    def sequences(self, step: int) -> NDArray[np.int64]:
        """Sequence numbers of one step over all ranks: (sequences_per_step,) int64."""
        g = step * self.sequences_per_step + np.arange(self.sequences_per_step)
        epochs, index = np.divmod(g, self.n_sequences)
        if self.shuffle:
            for epoch in np.unique(epochs):  # a step may end one epoch and begin the next
                mask = epochs == epoch
                index[mask] = permute(index[mask].astype(np.uint64), self.n_sequences, self.seed, int(epoch))
        return index

    def sequence(self, number: int) -> Tokens:
        """The T + 1 tokens of one sequence: (T + 1,) uint16."""
        start = number * self.T if self.starts is None else int(self.starts[number])
        return self.stream.read(start, self.T + 1)

    def batch(self, step: int, positions: slice) -> Batch:
        """The sequences at `positions` of a step, 0..sequences_per_step-1.

        Raises:
            UserError: a token id is outside the vocabulary.
        """
        tokens = np.stack([self.sequence(int(number)) for number in self.sequences(step)[positions]]).astype(np.int64)
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise UserError(
                f"the training shards hold token {largest:,}, the model's vocabulary ends at {self.vocab_size - 1:,}: "
                f"use shards of the model's tokenizer"
            )
        data = torch.from_numpy(tokens)
        return Batch(data[:, :-1].contiguous(), data[:, 1:].contiguous())


def micro_batch_slices(sequences_per_step: int, size: int, micro_batch_size: int, rank: int) -> list[slice]:
    """Positions of a step that this rank works on, one slice of at most micro_batch_size per micro-step.

    If the numbers are not divisible, some slices are one shorter, or a rank has one slice less.
    """
    own = range(rank * sequences_per_step // size, (rank + 1) * sequences_per_step // size)
    largest_share = -(-sequences_per_step // size)
    micro_steps = -(-largest_share // micro_batch_size)
    bounds = [own.start + i * len(own) // micro_steps for i in range(micro_steps + 1)]
    return [slice(low, high) for low, high in pairwise(bounds) if low < high]


class Prefetcher:
    """Reads the next micro-batch in a thread during the current one, and copies it to the device asynchronously."""

    def __init__(self, loader: Loader, slices: list[slice], device: torch.device) -> None:
        self.loader, self.slices, self.device = loader, slices, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next_key = (-1, 0)
        self._next: Future[Batch] | None = None

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The micro-batches of one step, on the device."""
        if self._next_key != (step, 0):
            self._submit(step, 0)
        for micro_step in range(len(self.slices)):
            assert self._next is not None
            batch = self._next.result()
            self._submit(*((step, micro_step + 1) if micro_step + 1 < len(self.slices) else (step + 1, 0)))
            yield Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def _submit(self, step: int, micro_step: int) -> None:
        self._next_key = (step, micro_step)
        self._next = self._pool.submit(self._read, step, self.slices[micro_step])

    def _read(self, step: int, positions: slice) -> Batch:
        batch = self.loader.batch(step, positions)
        return Batch(*(t.pin_memory() for t in batch)) if self.device.type == "cuda" else batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
