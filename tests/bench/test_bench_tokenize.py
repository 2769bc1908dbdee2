"""bench.tokenize: both sides do the same work, so that the ratio means something."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.tokenize import compare, text_size


@pytest.mark.slow
def test_both_sides_write_the_same_shards(tmp_path: Path) -> None:
    """Catches a benchmark that compares different work: compare() refuses shards that differ, and 200,000-token shards
    make both sides cross borders."""
    texts = [f"{number} bottles, don't drop them. " * (number % 50) for number in range(3000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "id": list(range(3000))}), path, row_group_size=500)
    assert text_size(path) == sum(map(len, texts))
    (tmp_path / "scratch").mkdir()
    table = compare([path], tmp_path / "scratch", workers=2, repeat=1, shard_tokens=200_000)
    assert "byte for byte" in table and "| plain method |" in table and "| this stage |" in table
    assert "3,000 documents" in table and "Ratio: **" in table


@pytest.mark.slow
def test_a_small_text_is_no_dead_end(tmp_path: Path) -> None:
    """Catches: shards that are larger than the text, and an error that names an option the command does not have."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a few words of text, and no more of them"] * 20}), path)
    (tmp_path / "scratch").mkdir()
    assert "20 documents" in compare([path], tmp_path / "scratch", workers=1, repeat=1)
