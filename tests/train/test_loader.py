"""The order of training data: every token once an epoch, the same whatever machine it runs on."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from token_shards import write_shards
from torch import distributed as dist

from gpt2.distributed import SINGLE_PROCESS, World
from gpt2.errors import UserError
from gpt2.tokenizer import EOT
from gpt2.train.loader import (
    Loader,
    Prefetcher,
    TokenStream,
    aligned_starts,
    micro_batch_slices,
    permute,
    write_aligned_starts,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097, 100_003])
def test_the_permutation_is_one(n: int) -> None:
    """Bug: an off-by-one in the halves or the cycle walk, which repeats some sequences and never shows others."""
    for seed, epoch in ((42, 0), (42, 1), (-7, 3)):
        image = permute(np.arange(n, dtype=np.uint64), n, seed, epoch)
        assert np.array_equal(np.sort(image), np.arange(n))


def test_the_permutation_looks_random() -> None:
    """Bug: a weak round function: neighbours that stay neighbours, epochs or seeds that resemble each other."""
    n = 100_000
    index = np.arange(n, dtype=np.uint64)
    images = [permute(index, n, seed, epoch).astype(float) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    series = [index.astype(float), *images, *(np.roll(image, 1) for image in images)]
    correlations = np.corrcoef(series) - np.eye(len(series))
    assert np.abs(correlations).max() < 5 / n**0.5  # 5 standard deviations of a coefficient
    gaps = np.diff(images[0])
    assert np.mean(np.abs(gaps) < n / 100) == pytest.approx(0.02, abs=0.003)
    fixed = [int((image == index).sum()) for image in images]
    assert max(fixed) <= 8  # each is Poisson(1)


def test_a_stream_reads_across_shards(tmp_path: Path) -> None:
    """Bug: a sequence that ends with its shard, so that tokens are lost at every border."""
    sizes = [100, 1, 0, 57, 300]
    seed = random.randrange(1 << 30)
    print("seed", seed)
    paths = write_shards(tmp_path, sizes, seed)
    stream = TokenStream(paths)
    whole = np.concatenate(stream.shards)
    assert len(stream) == 458
    rng = random.Random(seed)
    for _ in range(300):
        start = rng.randrange(458)
        n = rng.randrange(1, 459 - start)
        assert np.array_equal(stream.read(start, n), whole[start : start + n])


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_is_used_once_an_epoch(tmp_path: Path, shuffle: bool) -> None:
    """Bug: sequences repeated, or left out at shard borders and where a step crosses from one epoch to the next."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    paths = write_shards(tmp_path, [1000, 999, 1234], seed)
    T, per_step = 16, 12
    loader = Loader(paths, T, per_step, seed, 50_257, shuffle=shuffle)
    stream = TokenStream(paths).read(0, 3233)
    n = loader.n_sequences
    assert n == 3232 // T == 202 and n % per_step  # steps do cross epochs
    order = np.concatenate([loader.sequences(step) for step in range(3 * n)])[: 3 * n]
    for epoch in range(3):
        uses = np.zeros(len(stream), dtype=int)
        targets = np.zeros(len(stream), dtype=int)
        for number in order[epoch * n : (epoch + 1) * n]:
            sequence = loader.sequence(int(number))
            start = int(number) * T
            assert np.array_equal(sequence, stream[start : start + T + 1])
            uses[start : start + T] += 1
            targets[start + 1 : start + T + 1] += 1
        assert (uses[: n * T] == 1).all() and not uses[n * T :].any()  # the tail is shorter than one sequence
        assert (targets[1 : n * T + 1] == 1).all()
    if shuffle:
        assert not np.array_equal(order[:n], order[n : 2 * n])


def test_aligned_sequences_begin_at_documents(tmp_path: Path) -> None:
    """Bug: a start in the middle of a document, a token used twice, or a document passed over though there was room."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    paths = write_shards(tmp_path, [700, 900, 400], seed)
    stream = TokenStream(paths)
    whole = stream.read(0, 2000)
    T = 64
    write_aligned_starts(paths, T, tmp_path / "starts.npy", SINGLE_PROCESS)
    loader = Loader(paths, T, 4, seed, 50_257, starts=tmp_path / "starts.npy")
    starts = aligned_starts(stream, T)
    uses = np.zeros(2000, dtype=int)
    for number, start in enumerate(starts):
        sequence = loader.sequence(number)
        assert sequence[0] == EOT and np.array_equal(sequence, whole[start : start + T + 1])
        uses[start : start + T] += 1
    assert uses.max() == 1
    unused = np.flatnonzero((uses == 0) & (whole == EOT))  # a document start may only be passed over at the very end
    assert (unused + T >= 2000).all()


def test_finding_document_starts_has_no_time_limit(tmp_path: Path) -> None:
    """Bug: the other processes wait in a collective, which times out after ten minutes, while rank 0 looks at 100
    billion tokens. Here no process group exists, so that a collective raises."""
    paths, starts = write_shards(tmp_path, [700, 900], 3), tmp_path / "starts.npy"
    store = dist.HashStore()
    ranks = [World(rank, rank, 2, torch.device("cpu"), store) for rank in range(2)]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(write_aligned_starts, paths, 64, starts, ranks[1])
        write_aligned_starts(paths, 64, starts, ranks[0])
        other.result(timeout=60)
    assert np.array_equal(np.load(starts), aligned_starts(TokenStream(paths), 64))


def test_processes_and_micro_batches_do_not_change_a_step(tmp_path: Path) -> None:
    """Bug: resuming on other GPUs trains on other data. 12 sequences over 1 to 7 processes, whole or in parts."""
    paths = write_shards(tmp_path, [3000], 5)
    loader = Loader(paths, 16, 12, 42, 50_257)
    expected = loader.batch(3, slice(0, 12)).idx
    for size in range(1, 8):
        for micro in range(1, 13):
            parts = [part for rank in range(size) for part in micro_batch_slices(12, size, micro, rank)]
            together = torch.cat([loader.batch(3, part).idx for part in parts])
            assert torch.equal(together, expected)
            assert max(part.stop - part.start for part in parts) <= micro
            per_rank = [len(micro_batch_slices(12, size, micro, rank)) for rank in range(size)]
            assert max(per_rank) - min(per_rank) <= 1 and min(per_rank) >= 1


def test_batches_are_shifted_by_one_and_prefetched_in_order(tmp_path: Path) -> None:
    """Bug: targets that are the inputs, or a prefetched batch of another step after a jump."""
    paths = write_shards(tmp_path, [3000], 5)
    loader = Loader(paths, 16, 12, 42, 50_257)
    fetcher = Prefetcher(loader, micro_batch_slices(12, 1, 5, 0), torch.device("cpu"))
    for step in (0, 1, 7, 8, 2):
        got = list(fetcher.micro_batches(step))
        assert [len(batch.idx) for batch in got] == [4, 4, 4]
        assert torch.equal(torch.cat([batch.idx for batch in got]), loader.batch(step, slice(0, 12)).idx)
        assert all(torch.equal(batch.idx[:, 1:], batch.targets[:, :-1]) for batch in got)
    fetcher.close()


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Bug: an index error deep inside an embedding, or an endless loop over nothing."""
    paths = write_shards(tmp_path, [60], 5)
    with pytest.raises(UserError, match=r"60 tokens.* 65"):
        Loader(paths, 64, 4, 42, 50_257)
    loader = Loader(paths, 16, 2, 42, vocab_size=100)
    with pytest.raises(UserError, match=r"token 50,256.*99"):
        loader.batch(0, slice(0, 2))
