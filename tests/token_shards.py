"""Token shards with known content, for tests."""

from pathlib import Path

import numpy as np

from gpt2.shards import ShardWriter
from gpt2.tokenizer import EOT


def write_shards(folder: Path, sizes: list[int], seed: int, document: int = 40) -> list[Path]:
    """Shards whose token at place i of the stream is i, but for <|endoftext|> at random document starts."""
    rng = np.random.default_rng(seed)
    stream = np.arange(sum(sizes)) % 50_000
    starts = np.cumsum(rng.integers(1, 2 * document, size=len(stream)))
    stream[[0, *starts[starts < len(stream)]]] = EOT
    paths = []
    for number, part in enumerate(np.split(stream.astype(np.uint16), np.cumsum(sizes)[:-1])):
        paths.append(folder / f"text_train_{number + 1:06d}.bin")
        with ShardWriter(paths[-1]) as shard:
            shard.write(part)
    return paths
