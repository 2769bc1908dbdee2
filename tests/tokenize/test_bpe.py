"""gpt2.tokenize.bpe: exactly tiktoken's tokens, or tiktoken itself."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiktoken
from paths import SHARED_DATA

from bench.fuzz_bpe import difference
from gpt2.errors import UserError
from gpt2.tokenize import bpe
from gpt2.tokenize.bpe import CheckedEncoder, Kernel, Unavailable, make_encoder
from gpt2.tokenize.bpe_tables import CODE_POINTS, character_classes, tables
from gpt2.tokenize.bpe_test_text import hard_document, huge_document, random_document, sample_documents
from gpt2.tokenize.encoder import TiktokenEncoder
from gpt2.tokenize.lines import utf8
from gpt2.tokenize.reading import Batch
from gpt2.tokenizer import EOT, gpt2_encoding

DATA = SHARED_DATA

try:
    bpe.library()
except Unavailable as error:
    pytest.skip(f"the fast encoder is not to be had here: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return Kernel(gpt2_encoding())


@pytest.fixture(scope="module")
def judge() -> TiktokenEncoder:
    return TiktokenEncoder()


def same(kernel: Kernel, judge: TiktokenEncoder, documents: list[str], note: str = "") -> None:
    found = difference(kernel, judge, documents)
    assert found is None, f"{note} {found[:300]!r} ({len(found)} characters)"


EDGES = ["", " ", "\n", "'", "''", "'s", "''s", " 's", "'S", "'l", "'ll", "'lll", "'re're", "it's'", "a'", "a 'd"]
EDGES += [
    "'ve" * 9,
    "  a",
    "   a",
    "a  ",
    "a \n b",
    "\n\n\na",
    " \u3000a",
    "\u3000\u3000a",
    "\xa0a",
    " \xa0",
    "\x85\x85x",
]
EDGES += [
    "a\u2028\u2029b",
    "1 22  333   4444",
    "½²Ⅷ ٣",
    "a1b2",
    "!a",
    " !a",
    "!!  !!",
    "\x00\x00",
    "\ufeffa",
    "aé",
    "éa",
]
EDGES += ["x" * size for size in (15, 16, 17, 31, 32, 33, 256, 257, 10_000)] + [
    " " + "x" * size for size in (14, 15, 31)
]
EDGES += [
    " " * 15,
    " " * 16 + "y",
    "\t" * 1000,
    "é" * 7,
    "é" * 8,
    "abcdefghijklmnoé",
    "abcdefghijklmnopé",
    "\U0010ffff",
]
EDGES += ["abcdefghijklmnopqé", "<|endoftext|>", "👨\u200d👩\u200d👧"]


@pytest.mark.parametrize("text", EDGES)
def test_edges(kernel: Kernel, judge: TiktokenEncoder, text: str) -> None:
    """Catches each border of the pattern and of the kernel's own sizes (15, 31 and 256 bytes, 16 at a time)."""
    for before in ("", "a", " ", "9"):
        for after in ("", "b", " ", "'s", "é", "\n"):
            same(kernel, judge, [before + text + after])


def test_random_documents(kernel: Kernel, judge: TiktokenEncoder) -> None:
    """A short turn of `python -m bench.fuzz_bpe`, another each time."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(10):
        same(kernel, judge, [hard_document(rng) for _ in range(1000)], f"seed {seed}:")


def test_hard_documents_are_hard_and_follow_from_the_seed(kernel: Kernel, judge: TiktokenEncoder) -> None:
    """Catches: a fuzz that never tries surrogates, empty or huge documents, and one whose seed does not bring its
    finding back."""
    first, again = ([hard_document(random.Random(seed)) for seed in range(400)] for _ in range(2))
    assert first == again and first.count("") > 1
    surrogates = [text for text in first if re.search("[\ud800-\udfff]", text)]
    assert len(surrogates) > 10
    same(kernel, judge, surrogates)
    for seed in range(5):
        assert 1_000_000 <= len(huge_document(random.Random(seed))) < 1_100_000


class Joined(Kernel):
    """A kernel that takes a lone surrogate for nothing."""

    def encode(self, batch: Batch) -> np.ndarray:  # type: ignore[type-arg]
        return super().encode(Batch.of([batch[i].replace("\ufffd".encode(), b"") for i in range(len(batch))]))


def test_surrogates_are_judged_by_tiktoken_itself(judge: TiktokenEncoder) -> None:
    """Catches: a judge that is given what our own reading made of them, and so agrees with whatever that is."""
    assert difference(Joined(gpt2_encoding()), judge, ["fine", "a\ud800b"]) == "a\ud800b"


@pytest.mark.slow
def test_every_code_point_has_tiktokens_class(judge: TiktokenEncoder) -> None:
    """With GPT-2's own vocabulary a wrong class rarely shows in the ids. Here "x", "9" and "." merge with every first
    byte, so that whether a character joins a letter, a number or neither always shows."""
    gpt2 = gpt2_encoding()
    ranks = {gpt2.decode_single_token_bytes(rank): rank for rank in range(256)}
    for joining in (b"x", b"9", b"."):
        for byte in range(256):
            ranks.setdefault(joining + bytes([byte]), len(ranks))
    made_up = tiktoken.Encoding("made-up", pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={})
    kernel = Kernel(made_up)
    points = [chr(code) for code in range(CODE_POINTS) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(points), 100_000):
        documents = [f"x{c}\n9{c}\n.{c} {c}" for c in points[start : start + 100_000]]
        tokens = kernel.encode(Batch.of([document.encode() for document in documents]))
        right = [token for document in documents for token in (EOT, *made_up.encode_ordinary(document))]
        assert tokens.tolist() == right, f"code points from {ord(points[start]):#x}"


def test_classes_are_those_of_the_pattern() -> None:
    """Catches classes read in the wrong order or off by one; the counts are those of the pinned tiktoken."""
    classes = character_classes()
    assert [int((classes == number).sum()) for number in (1, 2, 3)] == [141_028, 1_911, 25]
    wanted = {
        "a": 1,
        "Z": 1,
        "é": 1,
        "東": 1,
        "5": 2,
        "½": 2,
        " ": 3,
        "\u3000": 3,
        "\x1f": 0,
        "!": 0,
        "\u200b": 0,
        "\U0010ffff": 0,
    }
    assert {c: int(classes[ord(c)]) for c in wanted} == wanted
    assert not classes[0xD800:0xE000].any()


def test_merges_are_complete() -> None:
    """Catches tables with only the pairs that the vocabulary was trained from."""
    found = tables(gpt2_encoding())
    assert len(found.pairs) > 50_000 and found.merged.max() == 50_255
    assert len(np.unique(found.pairs)) == len(found.pairs)


@pytest.mark.parametrize("size", [1, 300, 5000])
def test_runs_of_one_character(kernel: Kernel, judge: TiktokenEncoder, size: int) -> None:
    for character in "a Z0\n\t.=-é東😀\u0301":
        for length in (size, size + 1):
            same(kernel, judge, [character * length, character * length + "a", " " + character * length + " x"])


@pytest.mark.slow
def test_huge_documents(kernel: Kernel, judge: TiktokenEncoder) -> None:
    """Catches sizes in too few bits and quadratic time; tiktoken's regex engine itself gives up on a million blanks."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    same(kernel, judge, ["".join(random_document(rng) for _ in range(20_000))], f"seed {seed}:")
    same(kernel, judge, [huge_document(rng) for _ in range(6)], f"seed {seed}:")
    same(kernel, judge, ["ab" * 500_000, "=" * 1_000_000, " " * 1_500_000 + "x", "y" + "\n" * 1_500_000])


def test_machines_without_sse2(judge: TiktokenEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of other processors, which this one can go too: catches a difference nobody with an x86 would see."""
    monkeypatch.setattr(bpe, "FLAGS", (*bpe.FLAGS, "-DPORTABLE"))
    bpe.library.cache_clear()
    try:
        portable = Kernel(gpt2_encoding())
    finally:
        bpe.library.cache_clear()
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    same(portable, judge, [*EDGES, *(random_document(rng) for _ in range(3000))], f"seed {seed}:")


def test_lone_surrogates(kernel: Kernel) -> None:
    for text in ("a\ud800b", "\udc00\ud800", "\ud83d\ude00", "x\ud83d", "\ud800" * 20):
        tokens = kernel.encode(Batch.of([utf8(text)])).tolist()
        assert tokens == [EOT, *gpt2_encoding().encode_ordinary(text)]


def test_what_is_not_utf8_stays_inside_the_buffers(kernel: Kernel) -> None:
    """Readers refuse such text; should one slip through, it must not crash the process or read the neighbours."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(2000):
        raw = bytes(rng.choices([0x20, 0x61, 0x80, 0xBF, 0xC3, 0xE6, 0xF0, 0xF4, 0xF7, 0xFF], k=rng.randrange(1, 40)))
        alone = kernel.encode(Batch.of([raw]))
        page = np.frombuffer(raw + b"\xe6\x9d\xb1", dtype=np.uint8)
        beside = kernel.encode(Batch(page, np.array([0, len(raw)], dtype=np.int64)))
        assert np.array_equal(alone, beside), f"seed {seed}: {raw!r}"


def test_documents_do_not_see_each_other(kernel: Kernel, judge: TiktokenEncoder) -> None:
    """Catches reading 16 bytes at a time into the next document."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(300):
        documents = ["".join(rng.choices("ab '1\n", k=rng.randrange(5))) for _ in range(50)]
        same(kernel, judge, documents, f"seed {seed}:")


def test_a_document_that_goes_on(kernel: Kernel, judge: TiktokenEncoder) -> None:
    for encoder in (kernel, judge, CheckedEncoder(kernel)):
        assert encoder.encode(Batch.of([b"one", b"two"], begins=False)).tolist() == [505, EOT, 11545]
        assert encoder.encode(Batch.of([], begins=False)).tolist() == []


def test_threads(kernel: Kernel) -> None:
    """Catches state shared by threads: what pieces became, and the buffer for ids."""
    rng = random.Random(5)
    batches = [Batch.of([random_document(rng).encode() for _ in range(200)]) for _ in range(8)]
    alone = [kernel.encode(batch).tolist() for batch in batches]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(40):
            which = (number + turn) % len(batches)
            if kernel.encode(batches[which]).tolist() != alone[which]:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -------------------------------------------------------------------------------------------------- proof and fallback


class Forgetful(Kernel):
    """A kernel that goes wrong on a word, as one with a bug would."""

    word = b" zebra"

    def encode(self, batch: Batch) -> np.ndarray:  # type: ignore[type-arg]
        raw = batch.data.tobytes().replace(self.word, b" horse")
        return super().encode(Batch(np.frombuffer(raw, dtype=np.uint8), batch.offsets, batch.begins))


def test_a_wrong_kernel_is_not_used() -> None:
    """Catches a proof that proves nothing."""
    kernel = Forgetful(gpt2_encoding())
    kernel.word = sample_documents()[12].encode()[:6]
    with pytest.raises(Unavailable, match="does not give tiktoken's tokens for the built-in sample"):
        CheckedEncoder(kernel)


def test_a_difference_stops_the_stage() -> None:
    """Catches checks that are never made."""
    encoder = CheckedEncoder(Forgetful(gpt2_encoding()))
    fine, wrong = Batch.of([b"a horse"] * 50), Batch.of([b"a zebra"] * 50)
    assert len(encoder.encode(fine)) == 150
    with pytest.raises(UserError, match=r"differ on 'a zebra'.*tokenize_backend=tiktoken"):
        encoder.encode(wrong)


def test_checks_cost_about_a_thousandth(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches checking nothing after the first megabyte, and checking so much that the kernel is no faster."""
    encoder = CheckedEncoder(kernel)
    checked = 0
    encode_text = encoder._judge.encode_text

    def counted(text: str) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal checked
        checked += len(text)
        return encode_text(text)

    monkeypatch.setattr(encoder._judge, "encode_text", counted)
    batch = Batch.of([b"word " * 400] * 2000)  # 4 MB
    for _ in range(50):
        encoder.encode(batch)
    assert 0.0004 < checked / (50 * 4e6) < 0.0015


def test_without_a_compiler(tmp_path: Path) -> None:
    """Catches needing one: tiktoken does the work, and says so once."""
    code = "from gpt2.tokenize.bpe import make_encoder; print(make_encoder('auto').name)"
    environment = os.environ | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CC": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    said, used = done.stdout.splitlines()
    assert said.startswith(
        "tokenize: no C compiler (cc) for the fast encoder; tiktoken does the work, to the same bytes"
    )
    assert used == "tiktoken 0.14.0", done.stderr


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """Catches a half-written library that the next start would load."""
    broken = tmp_path / "cc"
    broken.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho half > "$2"\necho "cc: no such thing" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    code = "from gpt2.tokenize.bpe import make_encoder; print(make_encoder('auto').name)"
    environment = os.environ | {"CC": str(broken), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "failed: cc: no such thing; tiktoken does the work" in done.stdout, done.stderr
    assert list((tmp_path / "cache").rglob("*.so*")) == []


def test_threads_that_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: two compilers writing one file, so that a thread finds it gone and goes on with tiktoken for good."""
    slow = tmp_path / "cc"
    slow.write_text(f'#!/bin/sh\necho >> {tmp_path}/runs\nsleep 0.3\nexec {bpe._compiler()[0]} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: list[object] = []
    barrier = threading.Barrier(3)

    def work() -> None:
        barrier.wait()
        try:
            found.append(type(bpe.library()).__name__)
        except Unavailable as error:
            found.append(error)

    bpe.library.cache_clear()
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        bpe.library.cache_clear()
    assert found == ["CDLL"] * 3 and (tmp_path / "runs").read_text() == "\n"


@pytest.mark.slow
def test_compiled_once_and_again_when_the_source_changes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import gpt2.tokenize.bpe as b; b.SOURCE = Path(sys.argv[1]); b.library()"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    source = tmp_path / "bpe.c"
    text = bpe.SOURCE.read_text()
    for version, files in ((text, 1), (text, 1), (text + "/* changed */\n", 2)):
        source.write_text(version)
        subprocess.run([sys.executable, "-c", code, str(source)], env=environment, check=True)
        assert len(list((tmp_path / "cache").rglob("*.so"))) == files


def test_a_vocabulary_that_merging_alone_cannot_reach() -> None:
    """tiktoken takes a whole piece that is a token as it is; a vocabulary where that makes a difference is refused."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    odd = tiktoken.Encoding("odd", pat_str=gpt2_encoding()._pat_str, mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(Unavailable, match="token 256"):
        Kernel(odd)


def test_make_encoder() -> None:
    assert make_encoder("auto").name == "bpe.c, checked against tiktoken 0.14.0"
    assert make_encoder("tiktoken").name == "tiktoken 0.14.0"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_real_text(kernel: Kernel, judge: TiktokenEncoder) -> None:
    """All of ../shared/data but the larger part of the books for training: catches what nobody thought of."""
    for path in sorted(DATA.glob("*.parquet")):
        rows = pq.read_table(path, columns=["text"])["text"].to_pylist()
        same(kernel, judge, rows[::20] if "_train_" in path.name else rows, path.name)
    for path in sorted(DATA.glob("hellaswag*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        texts = [text for record in records for text in (record["ctx"], record["activity_label"], *record["endings"])]
        same(kernel, judge, [*texts, *(f" {text}" for text in texts)], path.name)
