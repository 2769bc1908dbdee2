"""gpt2.shards: the format, refusal of invalid files, and atomic writing."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.shards import HEADER_BYTES, ShardWriter, describe, open_shard, read_header, scan, verify
from gpt2.tokenizer import EOT, gpt2_encoding


def make(path: Path, tokens: list[int]) -> Path:
    with ShardWriter(path) as shard:
        shard.write(np.array(tokens, dtype=np.uint16))
    return path


def test_bytes_of_a_shard_are_llm_c_s(tmp_path: Path) -> None:
    """Catches any drift from llm.c's format, byte for byte, without our own reader's help."""
    raw = make(tmp_path / "a.bin", [EOT, 1, 65535]).read_bytes()
    assert raw == struct.pack("<3i", 20240520, 1, 3) + bytes(1024 - 12) + struct.pack("<3H", 50256, 1, 65535)


def test_round_trip_and_counts(tmp_path: Path) -> None:
    """Catches a wrong offset, and counting over pieces that loses the last one."""
    tokens = np.arange(10_001, dtype=np.uint16)
    tokens[::7] = EOT
    path = tmp_path / "a.bin"
    with ShardWriter(path) as shard:
        for start in range(0, len(tokens), 777):
            shard.write(tokens[start : start + 777])
    assert read_header(path) == len(tokens)
    assert np.array_equal(open_shard(path), tokens)
    assert scan(open_shard(path), piece=100) == (10_001, (tokens == EOT).sum(), EOT)
    assert shard.documents == (tokens == EOT).sum()


def test_empty_shard_opens(tmp_path: Path) -> None:
    """Catches mmap's refusal of empty mappings."""
    assert len(open_shard(make(tmp_path / "a.bin", []))) == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:-512], "header says 1,000 tokens, the file holds 744; delete it and run again"),
        (lambda raw: raw[:-1], "header says 1,000 tokens, the file holds 999 and half a token; delete it"),
        (lambda raw: raw + bytes(2), "header says 1,000 tokens, the file holds 1,001"),
        (lambda raw: raw[:100], "it has 100 bytes, less than a header's 1,024"),
        (
            lambda raw: struct.pack("<i", 20240801) + raw[4:],
            "it begins with 20240801, a GPT-2 shard begins with 20240520",
        ),
        (lambda raw: raw[:4] + struct.pack("<i", 2) + raw[8:], "has version 2; only version 1 is supported"),
        (lambda raw: raw[:8] + struct.pack("<i", -5) + raw[12:], "header says -5 tokens"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, damage: object, said: str) -> None:
    """Catches training on a cut-off download, and messages without both numbers."""
    path = make(tmp_path / "s.bin", [EOT] + [5] * 999)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=str(path)) as caught:
        open_shard(path)
    assert said in str(caught.value)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_header(tmp_path / "none.bin")


def test_another_tokenizers_tokens(tmp_path: Path) -> None:
    """Catches indexing past the embedding with shards of a larger vocabulary."""
    with pytest.raises(UserError, match="holds token 50,257; GPT-2's vocabulary ends at 50,256"):
        verify(make(tmp_path / "a.bin", [EOT, 50257]))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """Catches a half-written file under a shard's name, and destroying the one that stood there."""
    path = make(tmp_path / "a.bin", [1, 2])
    with pytest.raises(ZeroDivisionError), ShardWriter(path) as shard:
        shard.write(np.array([3], dtype=np.uint16))
        1 / 0  # noqa: B018
    assert open_shard(path).tolist() == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_no_space_is_a_clear_error() -> None:
    """/dev/full refuses every write as a full disk does."""
    shard = ShardWriter.__new__(ShardWriter)
    shard.path, shard.tokens, shard.documents = Path("/dev/full"), 0, 0
    shard._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(UserError, match="no space left for /dev/full"):
        shard.write(np.zeros(1 << 20, dtype=np.uint16))


def test_description(tmp_path: Path) -> None:
    """Catches first words that run through end-of-text, and a shard that begins inside a document."""
    encoding = gpt2_encoding()
    path = make(
        tmp_path / "a.bin", [EOT, *encoding.encode_ordinary("It was night."), EOT, *encoding.encode_ordinary("Two")]
    )
    assert describe(path).endswith("a.bin: 7 tokens, 2 documents begin in it; 'It was night. Two'")
    assert "0 documents begin in it; continues a document: 'night.'" in describe(
        make(tmp_path / "b.bin", encoding.encode_ordinary(" night."))
    )


def test_the_command_goes_on_after_an_invalid_shard(tmp_path: Path) -> None:
    """Catches stopping at the first bad file, and a zero exit status in spite of it."""
    good, bad = make(tmp_path / "good.bin", [EOT, 40]), tmp_path / "bad.bin"
    bad.write_bytes(bytes(HEADER_BYTES))
    done = subprocess.run(
        [sys.executable, "-m", "gpt2.shards", str(bad), str(good)], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {bad} is no token shard") and "Traceback" not in done.stderr
    assert done.stdout == f"{good}: 2 tokens, 1 documents begin in it; 'I'\n"


def test_a_folder_stands_for_its_shards(tmp_path: Path) -> None:
    """Catches a traceback for a folder where files are meant."""
    for name in ("b.bin", "a.bin"):
        make(tmp_path / name, [EOT, 40])
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "gpt2.shards", str(tmp_path), str(tmp_path / "empty")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"{tmp_path}/{name}.bin" for name in "ab"]
    assert done.stderr.startswith(f"error: {tmp_path / 'empty'} holds no") and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="is a folder, not a shard"):
        read_header(tmp_path)
