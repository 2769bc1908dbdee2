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
from gpt2.tokenize.bpe import CheckedEncoder, NativeEncoder, Unavailable, make_encoder
from gpt2.tokenize.bpe_tables import CODE_POINTS, build_tables, character_classes
from gpt2.tokenize.bpe_test_text import hard_document, huge_document, random_document, sample_documents
from gpt2.tokenize.encoder import TiktokenEncoder
from gpt2.tokenize.lines import to_utf8
from gpt2.tokenize.reading import DocumentBatch
from gpt2.tokenizer import EOT, gpt2_encoding

DATA = SHARED_DATA

try:
    bpe.library()
except Unavailable as error:
    pytest.skip(f"no fast encoder: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def native() -> NativeEncoder:
    return NativeEncoder(gpt2_encoding())


@pytest.fixture(scope="module")
def reference() -> TiktokenEncoder:
    return TiktokenEncoder()


def assert_same(native: NativeEncoder, reference: TiktokenEncoder, documents: list[str], note: str = "") -> None:
    document = difference(native, reference, documents)
    assert document is None, f"{note} {document[:300]!r} ({len(document)} characters)"


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
def test_tokens_at_borders_of_the_pattern_and_of_internal_sizes_are_tiktokens(
    native: NativeEncoder, reference: TiktokenEncoder, text: str
) -> None:
    """Bug: a difference at a border of the pattern or of bpe.c's sizes (15, 31 and 256 bytes, 16 at a time)."""
    for before in ("", "a", " ", "9"):
        for after in ("", "b", " ", "'s", "é", "\n"):
            assert_same(native, reference, [before + text + after])


def test_tokens_of_random_documents_are_tiktokens(native: NativeEncoder, reference: TiktokenEncoder) -> None:
    """A short run of `python -m bench.fuzz_bpe` with a fixed seed."""
    seed = 1
    rng = random.Random(seed)
    for _ in range(10):
        assert_same(native, reference, [hard_document(rng) for _ in range(1000)], f"seed {seed}:")


def test_hard_documents_are_hard_and_follow_from_the_seed(native: NativeEncoder, reference: TiktokenEncoder) -> None:
    """Catches: a fuzz that never tries surrogates, empty or huge documents, and one whose seed does not bring its
    finding back."""
    first, again = ([hard_document(random.Random(seed)) for seed in range(400)] for _ in range(2))
    assert first == again and first.count("") > 1
    surrogates = [text for text in first if re.search("[\ud800-\udfff]", text)]
    assert len(surrogates) > 10
    assert_same(native, reference, surrogates)
    for seed in range(5):
        assert 1_000_000 <= len(huge_document(random.Random(seed))) < 1_100_000


class Joined(NativeEncoder):
    """A kernel that takes a lone surrogate for nothing."""

    def encode(self, batch: DocumentBatch) -> np.ndarray:  # type: ignore[type-arg]
        return super().encode(DocumentBatch.of([batch[i].replace("\ufffd".encode(), b"") for i in range(len(batch))]))


def test_surrogates_are_judged_by_tiktoken_itself(reference: TiktokenEncoder) -> None:
    """Catches: a judge that is given what our own reading made of them, and so agrees with whatever that is."""
    assert difference(Joined(gpt2_encoding()), reference, ["fine", "a\ud800b"]) == "a\ud800b"


@pytest.mark.slow
def test_every_code_point_has_tiktokens_class(reference: TiktokenEncoder) -> None:
    """With GPT-2's own vocabulary a wrong class rarely shows in the ids. Here "x", "9" and "." merge with every first
    byte, so that whether a character joins a letter, a number or neither always shows."""
    gpt2 = gpt2_encoding()
    ranks = {gpt2.decode_single_token_bytes(rank): rank for rank in range(256)}
    for joining in (b"x", b"9", b"."):
        for byte in range(256):
            ranks.setdefault(joining + bytes([byte]), len(ranks))
    made_up = tiktoken.Encoding("made-up", pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={})
    native = NativeEncoder(made_up)
    points = [chr(code) for code in range(CODE_POINTS) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(points), 100_000):
        documents = [f"x{c}\n9{c}\n.{c} {c}" for c in points[start : start + 100_000]]
        tokens = native.encode(DocumentBatch.of([document.encode() for document in documents]))
        right = [token for document in documents for token in (EOT, *made_up.encode_ordinary(document))]
        assert tokens.tolist() == right, f"code points from {ord(points[start]):#x}"


def test_character_classes_are_those_of_the_pattern() -> None:
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


def test_merges_include_pairs_that_training_did_not_use() -> None:
    """Catches tables with only the pairs that the vocabulary was trained from."""
    tables = build_tables(gpt2_encoding())
    assert len(tables.pairs) > 50_000 and tables.merged.max() == 50_255
    assert len(np.unique(tables.pairs)) == len(tables.pairs)


@pytest.mark.parametrize("size", [1, 300, 5000])
def test_runs_of_one_character_are_tiktokens(native: NativeEncoder, reference: TiktokenEncoder, size: int) -> None:
    for character in "a Z0\n\t.=-é東😀\u0301":
        for length in (size, size + 1):
            assert_same(
                native, reference, [character * length, character * length + "a", " " + character * length + " x"]
            )


@pytest.mark.slow
def test_huge_documents_are_encoded_in_linear_time(native: NativeEncoder, reference: TiktokenEncoder) -> None:
    """Catches sizes in too few bits and quadratic time; tiktoken's regex engine itself gives up on a million blanks."""
    seed = 1
    rng = random.Random(seed)
    assert_same(native, reference, ["".join(random_document(rng) for _ in range(20_000))], f"seed {seed}:")
    assert_same(native, reference, [huge_document(rng) for _ in range(6)], f"seed {seed}:")
    assert_same(native, reference, ["ab" * 500_000, "=" * 1_000_000, " " * 1_500_000 + "x", "y" + "\n" * 1_500_000])


def test_the_code_for_machines_without_sse2_gives_the_same_tokens(
    reference: TiktokenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a difference that shows only on other processors."""
    monkeypatch.setattr(bpe, "FLAGS", (*bpe.FLAGS, "-DPORTABLE"))
    bpe.library.cache_clear()
    try:
        portable = NativeEncoder(gpt2_encoding())
    finally:
        bpe.library.cache_clear()
    seed = 1
    rng = random.Random(seed)
    assert_same(portable, reference, [*EDGES, *(random_document(rng) for _ in range(3000))], f"seed {seed}:")


def test_lone_surrogates_are_encoded_as_tiktoken_does(native: NativeEncoder) -> None:
    for text in ("a\ud800b", "\udc00\ud800", "\ud83d\ude00", "x\ud83d", "\ud800" * 20):
        tokens = native.encode(DocumentBatch.of([to_utf8(text)])).tolist()
        assert tokens == [EOT, *gpt2_encoding().encode_ordinary(text)]


def test_what_is_not_utf8_stays_inside_the_buffers(native: NativeEncoder) -> None:
    """Readers refuse such text; should one slip through, it must not crash the process or read the neighbours."""
    seed = 1
    rng = random.Random(seed)
    for _ in range(2000):
        raw = bytes(rng.choices([0x20, 0x61, 0x80, 0xBF, 0xC3, 0xE6, 0xF0, 0xF4, 0xF7, 0xFF], k=rng.randrange(1, 40)))
        alone = native.encode(DocumentBatch.of([raw]))
        page = np.frombuffer(raw + b"\xe6\x9d\xb1", dtype=np.uint8)
        beside = native.encode(DocumentBatch(page, np.array([0, len(raw)], dtype=np.int64)))
        assert np.array_equal(alone, beside), f"seed {seed}: {raw!r}"


def test_documents_do_not_see_each_other(native: NativeEncoder, reference: TiktokenEncoder) -> None:
    """Catches reading 16 bytes at a time into the next document."""
    seed = 1
    rng = random.Random(seed)
    for _ in range(300):
        documents = ["".join(rng.choices("ab '1\n", k=rng.randrange(5))) for _ in range(50)]
        assert_same(native, reference, documents, f"seed {seed}:")


def test_a_continued_document_gets_no_second_eot(native: NativeEncoder, reference: TiktokenEncoder) -> None:
    for encoder in (native, reference, CheckedEncoder(native)):
        assert encoder.encode(DocumentBatch.of([b"one", b"two"], begins=False)).tolist() == [505, EOT, 11545]
        assert encoder.encode(DocumentBatch.of([], begins=False)).tolist() == []


def test_threads_do_not_share_state(native: NativeEncoder) -> None:
    """Bug: remembered pieces or output buffers shared by threads."""
    rng = random.Random(5)
    batches = [DocumentBatch.of([random_document(rng).encode() for _ in range(200)]) for _ in range(8)]
    alone = [native.encode(batch).tolist() for batch in batches]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(40):
            which = (number + turn) % len(batches)
            if native.encode(batches[which]).tolist() != alone[which]:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -------------------------------------------------------------------------------------------------- proof and fallback


class Forgetful(NativeEncoder):
    """A kernel that goes wrong on a word, as one with a bug would."""

    word = b" zebra"

    def encode(self, batch: DocumentBatch) -> np.ndarray:  # type: ignore[type-arg]
        raw = batch.data.tobytes().replace(self.word, b" horse")
        return super().encode(DocumentBatch(np.frombuffer(raw, dtype=np.uint8), batch.offsets, batch.begins))


def test_a_wrong_encoder_is_not_used() -> None:
    """Catches a proof that proves nothing."""
    native = Forgetful(gpt2_encoding())
    native.word = sample_documents()[12].encode()[:6]
    with pytest.raises(Unavailable, match="built-in sample"):
        CheckedEncoder(native)


def test_a_difference_stops_the_stage() -> None:
    """Catches checks that are never made."""
    encoder = CheckedEncoder(Forgetful(gpt2_encoding()))
    fine, wrong = DocumentBatch.of([b"a horse"] * 50), DocumentBatch.of([b"a zebra"] * 50)
    assert len(encoder.encode(fine)) == 150
    with pytest.raises(UserError, match=r"differ on 'a zebra'.*tokenize_backend=tiktoken"):
        encoder.encode(wrong)


def test_checks_cost_about_a_thousandth(native: NativeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches checking nothing after the first megabyte, and checking so much that the kernel is no faster."""
    encoder = CheckedEncoder(native)
    checked = 0
    encode_text = encoder._reference.encode_text

    def counted(text: str) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal checked
        checked += len(text)
        return encode_text(text)

    monkeypatch.setattr(encoder._reference, "encode_text", counted)
    batch = DocumentBatch.of([b"word " * 400] * 2000)  # 4 MB
    for _ in range(50):
        encoder.encode(batch)
    assert 0.0004 < checked / (50 * 4e6) < 0.0015


def test_without_a_compiler_tiktoken_encodes(tmp_path: Path) -> None:
    """Catches needing one: tiktoken does the work, and says so once."""
    code = "from gpt2.tokenize.bpe import make_encoder; print(make_encoder('auto').name)"
    environment = os.environ | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CC": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    said, used = done.stdout.splitlines()
    assert "no C compiler (cc)" in said
    assert used == "tiktoken 0.14.0", done.stderr


def test_a_failed_compiler_leaves_no_library(tmp_path: Path) -> None:
    """Catches a half-written library that the next start would load."""
    broken = tmp_path / "cc"
    broken.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho half > "$2"\necho "cc: no such thing" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    code = "from gpt2.tokenize.bpe import make_encoder; print(make_encoder('auto').name)"
    environment = os.environ | {"CC": str(broken), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "failed: cc: no such thing; tiktoken" in done.stdout, done.stderr
    assert list((tmp_path / "cache").rglob("*.so*")) == []


def test_threads_that_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: two compilers writing one file, so that a thread finds it gone and goes on with tiktoken for good."""
    slow = tmp_path / "cc"
    slow.write_text(f'#!/bin/sh\necho >> {tmp_path}/runs\nsleep 0.3\nexec {bpe._compiler()[0]} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded: list[object] = []
    barrier = threading.Barrier(3)

    def work() -> None:
        barrier.wait()
        try:
            loaded.append(type(bpe.library()).__name__)
        except Unavailable as error:
            loaded.append(error)

    bpe.library.cache_clear()
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        bpe.library.cache_clear()
    assert loaded == ["CDLL"] * 3 and (tmp_path / "runs").read_text() == "\n"


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
        NativeEncoder(odd)


def test_the_encoder_names_tiktokens_version() -> None:
    assert make_encoder("auto").name == "bpe.c, checked against tiktoken 0.14.0"
    assert make_encoder("tiktoken").name == "tiktoken 0.14.0"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_tokens_of_real_text_are_tiktokens(native: NativeEncoder, reference: TiktokenEncoder) -> None:
    """All of ../shared/data, and every 20th row of training books."""
    for path in sorted(DATA.glob("*.parquet")):
        rows = pq.read_table(path, columns=["text"])["text"].to_pylist()
        assert_same(native, reference, rows[::20] if "_train_" in path.name else rows, path.name)
    for path in sorted(DATA.glob("hellaswag*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        texts = [text for record in records for text in (record["ctx"], record["activity_label"], *record["endings"])]
        assert_same(native, reference, [*texts, *(f" {text}" for text in texts)], path.name)
