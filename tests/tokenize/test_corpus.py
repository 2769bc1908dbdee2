"""gpt2.tokenize.corpus: documents in the same order for any division into units; bad input is named."""

from __future__ import annotations

import errno
import gzip
import io
import json
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import zstandard
from corpus_stages import tokenize_stage

from gpt2.errors import UserError
from gpt2.stage import directory as stage
from gpt2.stage.facts import Skipped
from gpt2.tokenize import lines, parquet
from gpt2.tokenize.bpe_tables import character_classes
from gpt2.tokenize.corpus import divide, kind_of, read
from gpt2.tokenize.encoder import TiktokenEncoder, encode_unit
from gpt2.tokenize.reading import (
    _CUT,
    BATCH_BYTES,
    BadInput,
    DocumentBatch,
    ReadOptions,
    TransientReadError,
    WorkUnit,
    last_cut,
    slices,
)
from gpt2.tokenize.stage import estimate_tokens, tokenize
from gpt2.tokenizer import gpt2_encoding

TEXT = ReadOptions("text")
SKIP = ReadOptions("text", "skip")
# White space to GPT-2's pattern, besides blanks, tabs and ends of lines.
BLANKS = [*"\x0b\x0c\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))]


def documents(batches: Iterator[DocumentBatch]) -> list[str]:
    parts: list[bytes] = []
    for batch in batches:
        for index in range(len(batch)):
            if index or batch.begins:
                parts.append(batch[index])
            else:
                parts[-1] += batch[index]
    return [document.decode() for document in parts]


def corpus_of(path: Path, reading: ReadOptions = TEXT) -> list[str]:
    units, _ = divide([(str(path), path.name)], reading)
    return documents(batch for unit in units for batch in read(unit, reading))


def skipped_of(path: Path) -> list[Skipped]:
    units, skipped = divide([(str(path), path.name)], SKIP)
    return skipped + [entry for unit in units for batch in read(unit, SKIP) for entry in batch.skipped]


def small(monkeypatch: pytest.MonkeyPatch, unit: int, batch: int) -> None:
    for module in (lines, parquet):
        monkeypatch.setattr(module, "UNIT_BYTES", unit)
        monkeypatch.setattr(module, "BATCH_BYTES", batch)


# ----------------------------------------------------------------------------------------------------------- parquet

WORDS = ["", "a", "Grüße aus 東京", "x" * 300, "two\nlines", " ", "\N{GRINNING FACE}" * 9, "eins zwei drei"]


def write(path: Path, array: pa.Array, **options: object) -> Path:
    table = pa.table({"id": pa.array(range(len(array))), "text": array})
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_parquet_of_every_text_type(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches reading 32-bit offsets as 64-bit ones, forgetting an array's offset, and units that lose a row group."""
    small(monkeypatch, unit=400, batch=100)
    rows = WORDS * 50
    if pa.types.is_dictionary(kind):
        array = pa.array(rows).dictionary_encode()
    else:
        array = pa.array(rows).cast(kind) if kind != pa.string_view() else pa.array(rows, kind)
    path = write(tmp_path / "a.parquet", array, row_group_size=30)
    units, _ = divide([(str(path), "a.parquet")], TEXT)
    assert len(units) > 3 and [u.first for u in units[1:]] == [u.last for u in units[:-1]]
    assert corpus_of(path) == rows
    for unit in units:
        assert sum(batch.consumed for batch in read(unit, TEXT)) == unit.size


def test_null_rows_are_named_or_skipped(tmp_path: Path) -> None:
    """Catches null read as the empty document, and rows counted from the wrong start."""
    path = write(tmp_path / "a.parquet", pa.array(["a", "b", "c", "d", None, "f", None]), row_group_size=3)
    with pytest.raises(UserError, match=r"a.parquet, row group 1, row 1: null instead of text; .*on_bad_input=skip"):
        corpus_of(path)
    assert corpus_of(path, SKIP) == ["a", "b", "c", "d", "f"]
    assert skipped_of(path) == [
        Skipped(file="a.parquet", row_group=1, rows=1, reason="null instead of text; first at row group 1, row 1"),
        Skipped(file="a.parquet", row_group=2, rows=1, reason="null instead of text; first at row group 2, row 0"),
    ]


def test_rows_that_are_not_utf8(tmp_path: Path) -> None:
    """Arrow does not check: catches bytes that are no text reaching an encoder that trusts them."""
    raw = pa.array([b"good", None, b"bad \xff\xfe", b"cut \xe6\x9d", b"fine \xc3\xa9"])
    path = write(tmp_path / "a.parquet", raw.view(pa.string()))
    with pytest.raises(UserError, match="row group 0, row 2: not UTF-8"):
        list(parquet._text(raw.drop_null().view(pa.string()), TEXT, "x", 0, 1, BadInput("error")))
    assert corpus_of(path, SKIP) == ["good", "fine é"]
    assert [(s.rows, s.reason) for s in skipped_of(path)] == [
        (1, "null instead of text; first at row group 0, row 1"),
        (2, "not UTF-8; first at row group 0, row 2"),
    ]


def damage(path: Path, group: int) -> None:
    """Overwrite the middle of a row group's text."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(1)
    raw = bytearray(path.read_bytes())
    middle = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2
    raw[middle : middle + 40] = bytes(40)
    path.write_bytes(raw)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_damaged_row_group(tmp_path: Path, compression: str) -> None:
    """Catches a traceback from Arrow's depths, silently wrong text where pages have checksums, and losing the row
    groups that are whole."""
    random.seed(1)
    rows = ["".join(random.choices("abcdefgh ", k=200)) for _ in range(90)]
    path = write(
        tmp_path / "a.parquet", pa.array(rows), row_group_size=30, compression=compression, write_page_checksum=True
    )
    damage(path, 1)
    with pytest.raises(UserError, match=r"a.parquet, row group 1, row 0: cannot be read: "):
        corpus_of(path)
    assert corpus_of(path, SKIP) == rows[:30] + rows[60:]
    (entry,) = skipped_of(path)
    assert (entry.file, entry.row_group, entry.rows) == ("a.parquet", 1, 30)


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    """Catches a cut-off download read as an empty corpus."""
    path = write(tmp_path / "a.parquet", pa.array(WORDS))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a.parquet, its footer: not a readable parquet file"):
        corpus_of(path)
    assert corpus_of(path, SKIP) == [] and skipped_of(path)[0].file == "a.parquet"
    with pytest.raises(UserError, match=r"b.parquet is missing \(/.*b.parquet\)"):
        corpus_of(tmp_path / "b.parquet")


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(WORDS))
    with pytest.raises(UserError, match=r"a.parquet has no column 'body'; it has id, text: set text_column"):
        divide([(str(path), "a.parquet")], ReadOptions("body"))
    with pytest.raises(UserError, match="column 'id' is int64, not text"):
        divide([(str(path), "a.parquet")], ReadOptions("id"))


def test_columns_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """Catches: a traceback from Arrow, or the text of another column."""
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    struct = pa.table({"a": [{"b": "x"}], "a.b": ["y"]})
    for name, table, column in (("twice", twice, "text"), ("struct", struct, "a.b")):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path)
        with pytest.raises(UserError, match=rf"{name}\.parquet has 2 columns .*'{re.escape(column)}'.*text_column"):
            divide([(str(path), path.name)], ReadOptions(column))


def test_a_batch_is_as_large_as_its_text(tmp_path: Path) -> None:
    """Catches: rows counted by their size in the file, where a text that comes often is there once: 200 MB at once out
    of a file of 19 kB. And short rows left in batches as small as the first."""
    texts = pa.array([f"{number} " + "lorem ipsum " * 800 for number in range(40)])
    often = pa.DictionaryArray.from_arrays(pa.array([number % 40 for number in range(6000)], pa.int32()), texts)
    for name, array in (("a", often.cast(pa.string())), ("b", often)):
        path = write(tmp_path / f"{name}.parquet", array, row_group_size=3000)
        assert path.stat().st_size < 100_000
        (unit,) = divide([(str(path), path.name)], TEXT)[0]
        sizes = [int(batch.offsets[-1] - batch.offsets[0]) for batch in read(unit, TEXT)]
        assert sum(sizes) > 50e6 and max(sizes) < 1.1 * BATCH_BYTES
        assert len(sizes) < 25, "Arrow does not take another number of rows midway"
    path = write(tmp_path / "c.parquet", pa.array([f"row {number}" for number in range(40_000)]))
    assert corpus_of(path) == [f"row {number}" for number in range(40_000)]
    assert len(list(read(divide([(str(path), "c.parquet")], TEXT)[0][0], TEXT))) < 20


def test_a_file_of_no_rows(tmp_path: Path) -> None:
    """Catches: StopIteration out of the estimate of tokens, for which such a file has no text."""
    empty = write(tmp_path / "a.parquet", pa.array([], pa.string()))
    other = write(tmp_path / "b.parquet", pa.array(WORDS))
    assert pq.ParquetFile(empty).metadata.num_row_groups == 1
    for files in ([empty], [empty, other]):
        units, _ = divide([(str(path), path.name) for path in files], TEXT)
        assert (estimate_tokens(units, TEXT, TiktokenEncoder()) > 0) == (other in files)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """Catches reading a whole row group (300 MB here) at once."""
    psutil = pytest.importorskip("psutil")
    path = tmp_path / "a.parquet"
    rows = pa.array([f"{number} " + "lorem ipsum dolor " * 500 for number in range(33_000)])
    write(path, rows, row_group_size=10**9)
    del rows
    pa.default_memory_pool().release_unused()
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    peak = 0
    (unit,) = divide([(str(path), "a.parquet")], TEXT)[0]
    for _ in read(unit, TEXT):
        peak = max(peak, process.memory_info().rss - before)
    assert unit.size > 250e6 and peak < 120e6, f"{peak / 1e6:.0f} MB for a row group of {unit.size / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------------------- jsonl


def pack(path: Path, raw: bytes) -> Path:
    if path.suffix == ".gz":
        half = len(raw) // 2  # two members, as `cat a.gz b.gz` makes
        raw = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    elif path.suffix == ".zst":
        half = len(raw) // 2
        raw = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_jsonl_whatever_the_units(tmp_path: Path, suffix: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a line read by two units or by none, where a border falls on, before or after a line's end."""
    rows = WORDS * 3
    raw = (
        "\n".join(json.dumps({"n": i, "text": row}, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)) + end
    ).encode()
    path = pack(tmp_path / f"a{suffix}", raw)
    for unit in (*range(1, 40), 1000):
        small(monkeypatch, unit=unit, batch=64)
        assert corpus_of(path) == rows, f"units of {unit} bytes"
        for one in divide([(str(path), path.name)], TEXT)[0]:
            assert sum(batch.consumed for batch in read(one, TEXT)) == one.size


def test_jsonl_rows_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches str(None) or a number's digits as text, and line numbers counted within a unit."""
    small(monkeypatch, unit=20, batch=20)
    lines = ['{"text": "one"}', '{"text": null}', '{"text": 5}', '{"other": 1}', "[1]", "{oops", "", '{"text": "two"}',
             '{"text": ["x"]}', '{"text": "\xff"}', "[" * 10_000]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(UserError, match=r"a.jsonl, line 2: null instead of text"):
        corpus_of(path)
    assert corpus_of(path, SKIP) == ["one", "two"]
    reasons = {entry.reason for entry in skipped_of(path)}
    assert "int instead of text; first at line 3" in reasons
    assert "no field 'text'; first at line 4" in reasons
    assert "list instead of an object; first at line 5" in reasons
    assert "list instead of text; first at line 9" in reasons
    assert any(
        reason.startswith("not JSON: Expecting property name") and reason.endswith("line 6") for reason in reasons
    )
    assert any(reason.endswith("line 10") for reason in reasons)
    assert any("recursion" in reason and reason.endswith("line 11") for reason in reasons)
    assert len(reasons) == 8


def test_jsonl_first_line_without_the_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl has no field 'text'; its first line has body, id: set text_column"):
        divide([(str(path), path.name)], TEXT)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".txt.gz"])
@pytest.mark.parametrize(
    "harm", [lambda raw: raw[: len(raw) * 2 // 3], lambda raw: raw[:-1], lambda raw: b"no" + raw[2:]]
)
def test_damaged_compressed_files(tmp_path: Path, suffix: str, harm: Callable[[bytes], bytes]) -> None:
    """Catches a cut-off file taken for its whole, and a bare zlib error."""
    random.seed(2)
    text = [" ".join(random.choices(WORDS, k=20)) for _ in range(3000)]
    raw = "\n".join(json.dumps({"text": row}) for row in text) if "jsonl" in suffix else "\n".join(text)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(harm(pack(path, raw.encode()).read_bytes()))
    with pytest.raises(UserError, match=f"a{suffix}, compressed data: cannot be read to its end: "):
        corpus_of(path)
    assert len(corpus_of(path, SKIP)) <= 3000 and len(skipped_of(path)) == 1


def test_surrogates_as_tiktoken_treats_them(tmp_path: Path) -> None:
    """Catches an encoding error on JSON escapes that UTF-8 cannot hold."""
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b \ud83d\ude00 \udc00"}' + "\n")
    (text,) = corpus_of(path)
    assert gpt2_encoding().encode_ordinary(text) == gpt2_encoding().encode_ordinary("a\ud800b \ud83d\ude00 \udc00")


def test_bytes_that_encode_surrogates_are_not_utf8(tmp_path: Path) -> None:
    """Catches: text changed to U+FFFD in silence, which txt and parquet refuse. An escape in ASCII is valid JSON."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "a\xed\xa0\x80b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not UTF-8"):
        corpus_of(path)
    assert corpus_of(path, SKIP) == ["one"] and [entry.rows for entry in skipped_of(path)] == [1]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert corpus_of(path) == ["one"]


# --------------------------------------------------------------------------------------------------------------- txt


def split_text(text: str) -> list[str]:
    """What the module's docstring says, in one line."""
    return [part for part in re.split(r"(?:\A|(?<=\n))(?:<\|endoftext\|>(?:\r?\n|\Z))", text) if part]


def random_text(rng: random.Random) -> str:
    end = "<|endoftext|>"
    pieces = [f"{end}\n", f"\n{end}\n", end, f"{end} ", f"\r\n{end}\r\n", f"x{end}\n", f"{end}\n{end}\n"]
    pieces += ["\n", " ", "  ", "\t", "don't", "12", "word", "é", "\u3000", "!", "\x85", "東京"]
    return "".join(rng.choices(pieces, k=rng.randrange(60)))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_txt_whatever_the_units(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a separator missed or invented at a border, and a document that begins twice."""
    seed = 1
    rng = random.Random(seed)
    for trial in range(150):
        text = random_text(rng)
        path = pack(tmp_path / f"a{suffix}", text.encode())
        small(monkeypatch, unit=rng.randrange(1, 80), batch=rng.randrange(1, 80))
        assert corpus_of(path) == split_text(text), f"seed {seed}, trial {trial}"


def test_txt_becomes_the_same_tokens_whatever_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a cut inside a token, and a document that begins at a border where none does or the other way round."""
    seed = 1
    rng = random.Random(seed)
    encoder = TiktokenEncoder()
    path = tmp_path / "a.txt"
    pieces = [*BLANKS, "\n", "\n", "\r\n", " ", "\n<|endoftext|>\n", "\n<|endoftext|>\r\n", "<|endoftext|>\n"]
    pieces += [*"中文東京語한국어。、，！яж", "word", "12", "don't"] * 2
    opened = 0
    for trial in range(60):
        text = "".join(rng.choices(pieces, k=rng.randrange(80)))
        path.write_bytes(text.encode())
        small(monkeypatch, unit=rng.randrange(1, 60), batch=rng.randrange(1, 60))
        units, _ = divide([(str(path), "a.txt")], TEXT)
        opened += sum(unit.opens for unit in units[1:])
        tokens = [part.tokens for unit in units for part in encode_unit(unit, TEXT, encoder)]
        whole = encoder.encode(DocumentBatch.of([part.encode() for part in split_text(text)]))
        assert np.array_equal(np.concatenate([np.empty(0, np.uint16), *tokens]), whole), f"seed {seed}, trial {trial}"
    assert opened > 10


@pytest.mark.parametrize("end", ["。\n", "\u3000\n", "。<|endoftext|>\n", "\u3000\n<|endoftext|>\n"], ids=ascii)
def test_txt_without_ascii_is_not_held_whole(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a Chinese text that one worker has to have in memory, for want of a place where it can be cut."""
    text = ("中文文本没有空格" * 20 + end) * 1500
    path = tmp_path / "a.txt"
    path.write_text(text, newline="")
    small(monkeypatch, unit=1 << 17, batch=1 << 14)
    units, _ = divide([(str(path), "a.txt")], TEXT)
    batches = [batch for unit in units for batch in read(unit, TEXT)]
    assert documents(iter(batches)) == split_text(text)
    if end != "\u3000\n":  # nowhere in this one can it be cut
        assert len(units) > 3
        assert max(len(batch.data) for batch in batches) < 1 << 16


def test_txt_without_separators_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("  One.\n\nTwo.\n")
    assert corpus_of(path) == ["  One.\n\nTwo.\n"]
    path.write_text("")
    assert corpus_of(path) == []


def test_txt_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n<|endoftext|>\nna\xefve\n<|endoftext|>\nlast")
    with pytest.raises(UserError, match=r"a.txt, bytes 0 to \d+, near b'na\\xefve\\n': not UTF-8"):
        corpus_of(path)
    assert corpus_of(path, SKIP) == ["fine\n", "last"]


def test_a_text_can_be_cut_where_we_cut_it() -> None:
    """Catches a cut that changes tokens: in a word, in a contraction, in white space that is looked ahead from."""
    seed = 1
    rng = random.Random(seed)
    # Here any two neighbours in a piece are a token, so that a border in another place always shows.
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes([one, two]): len(ranks) + 256 * one + two for one in range(256) for two in range(256)}
    pairs = tiktoken.Encoding("pairs", pat_str=gpt2_encoding()._pat_str, mergeable_ranks=ranks, special_tokens={})
    alphabet = [*"abz019.,'\"-( \n\t\r", "'s", "'ll", "  ", *BLANKS, *"éßя東中文字。、，「」한٣½\u0301\x1f\u200b🙂"]
    cuts = 0
    for _ in range(1500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(2, 30)))
        raw = text.encode()
        for cut in {last_cut(raw, 0, end) for end in range(len(raw) + 1)} - {-1}:
            parts = raw[:cut].decode(), raw[cut:].decode()
            for encode in (gpt2_encoding().encode_ordinary, pairs.encode_ordinary):
                assert encode(parts[0]) + encode(parts[1]) == encode(text), f"seed {seed}: {text!r} at {cut}"
            cuts += 1
    assert cuts > 500


def test_a_text_can_be_cut_after_anything_but_white_space() -> None:
    """Catches: white space that we do not know and tiktoken does, and text in no alphabet of ours that is held whole
    because it is never cut."""
    blank = character_classes() == 3
    for code in range(0x80, len(blank)):
        if not 0xD800 <= code < 0xE000:
            raw = f"{chr(code)}\n".encode()
            assert (_CUT.search(raw) is None) == blank[code], f"{code:#x}"
    assert set(BLANKS) == {chr(code) for code in np.flatnonzero(blank)} - set(" \t\n\r")


def test_slices_keep_everything_and_stay_small() -> None:
    """Catches bytes lost or repeated between slices, and documents that begin in the wrong slice."""
    seed = 1
    rng = random.Random(seed)
    for _ in range(300):
        texts = [
            "".join(rng.choices(["word", " ", "\n", "é"], k=rng.randrange(30))).encode()
            for _ in range(rng.randrange(1, 9))
        ]
        whole = DocumentBatch.of(texts, begins=rng.random() < 0.5)
        parts = list(slices(whole, limit=20))
        assert documents(iter([DocumentBatch.of([b""]), *parts])) == documents(
            iter([DocumentBatch.of([b""]), whole])
        ), f"seed {seed}"
        for part in parts:
            if part.offsets[-1] - part.offsets[0] > 20:  # only where there is no place to cut
                assert len(part) == 1 and last_cut(part[0], 0, 20) < 0


@pytest.mark.slow
def test_a_giant_document_without_a_place_to_cut_is_searched_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches searching all of a text again for each block that is read: 40 MB took minutes."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 40_000_000)
    small(monkeypatch, unit=1 << 20, batch=1 << 16)
    units, _ = divide([(str(path), "a.txt")], TEXT)
    assert [(u.first, u.last) for u in units] == [(0, 40_000_000)]
    assert [len(batch[0]) for batch in read(units[0], TEXT)] == [40_000_000]


# -------------------------------------------------------------------------------------- files that cannot be read now


class Flaky(io.FileIO):
    """A file of which one reading fails."""

    def __init__(self, path: str, error: BaseException, good: int) -> None:
        super().__init__(path)
        self._error, self._good = error, good

    def _count(self) -> None:
        self._good -= 1
        if self._good == -1:
            raise self._error

    def read(self, size: int | None = -1) -> bytes | None:
        self._count()
        return super().read(-1 if size is None else size)

    def readinto(self, buffer: Any) -> int | None:
        self._count()
        return super().readinto(buffer)

    def readline(self, size: int | None = -1) -> bytes:
        self._count()
        return super().readline(-1 if size is None else size)


def flaky(monkeypatch: pytest.MonkeyPatch, error: BaseException, good: int) -> None:
    parquet._last_file.__dict__.clear()
    for module in (lines, parquet):
        monkeypatch.setattr(module, "open_raw", lambda path, name: Flaky(path, error, good))


TRANSIENT = [
    TimeoutError("no answer"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError("Access Denied"),
    ConnectionResetError("gone"),
    pa.ArrowMemoryError("malloc of size 64 failed"),
    MemoryError(),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz"])
def test_what_cannot_be_read_now_is_not_left_out(
    tmp_path: Path, suffix: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a time-out taken for damaged data, so that it depends on the weather what is trained on; and an error
    of the user's, which a cluster would not try again."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write(path, pa.array(WORDS * 20), row_group_size=40)
    else:
        pack(path, "\n".join(json.dumps({"text": word}) for word in WORDS * 20).encode())
    right = corpus_of(path)
    assert right
    failed = 0
    for good in range(30):
        flaky(monkeypatch, error, good)
        for reading in (SKIP, TEXT):
            try:
                assert corpus_of(path, reading) == right
            except TransientReadError as caught:
                assert not isinstance(caught, UserError)
                bare = TransientReadError(
                    *caught.args
                )  # one error raised again and again has an endless traceback by now
                assert type(pickle.loads(pickle.dumps(bare))) is TransientReadError
                assert str(caught).startswith(f"a{suffix} cannot be read now ({type(error).__name__}"), caught
                failed += 1
    assert failed >= 2


def test_a_stage_says_in_one_line_what_cannot_be_read_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a traceback, and "no answer" without the file's name."""
    files = [write(tmp_path / "a.parquet", pa.array(WORDS * 300), row_group_size=300)]
    runtime = {"tokenize_workers": 1, "tokenize_backend": "tiktoken"}
    directory = tokenize_stage(tmp_path / "store", files, runtime=runtime, shard_tokens=100, on_bad_input="skip")
    for error in (TimeoutError("no answer"), pa.ArrowMemoryError("no room")):
        flaky(monkeypatch, error, 8)
        with pytest.raises(SystemExit) as ended:
            stage.main(tokenize, [str(directory.path)])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1, said
        assert said.startswith("error: data/00000-a.parquet cannot be read now (") and str(error) in said


# ------------------------------------------------------------------------------------------------------------- files


def test_formats_are_recognised_by_suffix() -> None:
    assert kind_of("data/00000-A.PARQUET") == ("parquet", None)
    assert kind_of("x.jsonl.zst") == ("jsonl", "zstd") and kind_of("x.txt.gz") == ("txt", "gzip")
    for name in ("x.parquet.gz", "x.csv", "x", "x.gz"):
        with pytest.raises(UserError, match=rf"{name} .*\.parquet, \.jsonl"):
            kind_of(name)


def test_fsspec_addresses_are_read(tmp_path: Path) -> None:
    """Catches paths built with os.path where an fsspec address was given."""
    memory = fsspec.filesystem("memory")
    for name, path in (("a.parquet", write(tmp_path / "a.parquet", pa.array(WORDS))),):
        memory.pipe(f"/there/{name}", path.read_bytes())
    memory.pipe("/there/b.txt", b"some text")
    units, _ = divide([("memory://there/a.parquet", "a.parquet"), ("memory://there/b.txt", "b.txt")], TEXT)
    assert documents(batch for unit in units for batch in read(unit, TEXT)) == [*WORDS, "some text"]
    with pytest.raises(UserError, match=r"memory://there/c.txt"):
        divide([("memory://there/c.txt", "c.txt")], TEXT)


def test_a_unit_travels_as_json() -> None:
    unit = WorkUnit(path="p", name="n", kind="txt", first=0, last=9, size=9)
    assert WorkUnit.model_validate_json(unit.model_dump_json()) == unit
    assert len(DocumentBatch.of([])) == 0 and np.array_equal(DocumentBatch.of([b"ab", b""]).offsets, [0, 2, 2])
