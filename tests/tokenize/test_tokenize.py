"""gpt2.tokenize: tokens exactly tiktoken's, the same bytes however the work is done, and nothing done twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_stages import expected, stream, tokenize_stage
from paths import SHARED_DATA

from gpt2.config.run import TokenizeConfig
from gpt2.errors import UserError
from gpt2.shards import ShardWriter, open_shard
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TokenizeFacts
from gpt2.stage.manifest import canonical, sha256_file
from gpt2.stage.metrics import read_metrics
from gpt2.tokenize import import_shards
from gpt2.tokenize import stage as tokenize_module
from gpt2.tokenize.bpe import make_encoder
from gpt2.tokenize.corpus import divide
from gpt2.tokenize.encoder import EncodedPart, encode_unit
from gpt2.tokenize.process_pool import ProcessPool
from gpt2.tokenize.progress import TokenizeProgress
from gpt2.tokenize.reading import ReadOptions, WorkUnit, slices
from gpt2.tokenize.shard_sequence import ShardSequence
from gpt2.tokenize.shard_store import PROGRESS, ShardStore
from gpt2.tokenize.stage import estimate_tokens, plan_fingerprint, tokenize, write_shards
from gpt2.tokenizer import EOT

DATA = SHARED_DATA
BACKENDS = ("auto", "tiktoken")

# Fixture text of our own: what the golden bytes are taken of. It must never change.
GOLDEN = [
    "A tokenizer's bytes are decided here: in one place, once.",
    "",
    "  Two spaces, a tab\tand a\n\nblank line. 3.14159, 1,000,000 and ½.  \n",
    "We're, they've, I'll, she'd, it's, o'clock, 'tis; WE'RE in capitals are not contractions.",
    "Straße, naïve, Ελλάδα, Привет, שלום, مرحبا, नमस्ते, 東京, 한국어, \N{GRINNING FACE}\N{ZERO WIDTH JOINER}\u200d!",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "<|endoftext|> in a text is a text.",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u00a0no-break\u2003em space\u3000ideographic\x85next line\x1funit separator",
]


def texts(count: int, seed: int = 7) -> list[str]:
    rng = random.Random(seed)
    words = [word for text in GOLDEN for word in text.split(" ")]
    return [" ".join(rng.choices(words, k=rng.randrange(80))) for _ in range(count)]


def parquet(path: Path, rows: list[Any], row_group_size: int = 50) -> Path:
    pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), path, row_group_size=row_group_size)
    return path


def facts(stage: StageDir) -> TokenizeFacts:
    return stage.facts(TokenizeFacts)


def hashes(stage: StageDir) -> dict[str, str]:
    assert stage.manifest is not None
    return {entry.path: entry.sha256 for entry in stage.manifest.files}


@pytest.fixture
def little_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units and batches out of little text; child processes divide nothing, so they see the same units."""
    for module in ("parquet", "lines"):
        monkeypatch.setattr(f"gpt2.tokenize.{module}.UNIT_BYTES", 4000)
        monkeypatch.setattr(f"gpt2.tokenize.{module}.BATCH_BYTES", 1500)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_bytes(tmp_path: Path, backend: str) -> None:
    """Catches any change of the bytes that comes without a new VERSION of the stage, and so would be taken from the
    cache for some users and not for others. If it is meant: raise tokenize's version in gpt2/stage/table.py."""
    from gpt2.stage.table import STAGES

    stage = tokenize_stage(
        tmp_path, [parquet(tmp_path / "a.parquet", GOLDEN)], val_tokens=100, shard_tokens=80,
        runtime={"tokenize_backend": backend},
    )  # fmt: skip
    tokenize(stage)
    assert STAGES["tokenize"].version == 1
    assert stream(stage) == expected(GOLDEN)
    assert {path: sha[:16] for path, sha in hashes(stage).items()} == {
        "shards/fineweb_val_000000.bin": "a96edce0be708700",
        "shards/fineweb_train_000001.bin": "085381383739d094",
        "shards/fineweb_train_000002.bin": "ffd9b00066288c20",
    }


def test_shards_end_where_llm_c_ends_them(tmp_path: Path) -> None:
    """Catches borders one token off llm.c's, a document counted twice, and documents that do not run on over shards."""
    rows = texts(200)
    stage = tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", rows)], prefix="web-1", shard_tokens=2000)
    manifest = tokenize(stage)
    whole = expected(rows)
    assert stream(stage) == whole
    names = [entry.path for entry in manifest.files]
    assert names == ["shards/web-1_val_000000.bin", *(f"shards/web-1_train_{i:06d}.bin" for i in range(1, len(names)))]
    result = facts(stage)
    assert [shard.tokens for shard in result.shards] == [2000] * (len(names) - 1) + [len(whole) % 2000]
    assert [shard.split for shard in result.shards] == ["val"] + ["train"] * (len(names) - 1)
    assert (result.documents, result.val_tokens, result.train_tokens) == (200, 2000, len(whole) - 2000)
    assert result.skipped == () and "tiktoken 0.14.0" in result.backend
    assert open_shard(stage.path / names[1])[0] != EOT, "the fixture should have a document that crosses the border"
    assert not (stage.path / PROGRESS).exists()
    assert manifest.problems(stage.path, deep=True) == []
    lines = list(read_metrics(stage.path / "metrics.jsonl"))
    assert lines[-1]["done"] == lines[-1]["total"] and lines[-1]["unit"] == "bytes"
    assert lines[-1]["tokenize/tokens"] == len(whole)


@pytest.mark.parametrize("tokens", [1, 7, 999])
def test_a_stream_that_ends_with_a_shard(tmp_path: Path, tokens: int) -> None:
    """Catches an empty last shard, and a last whole shard left out."""
    rows = [" a" * (3 * tokens - 1)]
    stage = tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", rows)], shard_tokens=tokens)
    tokenize(stage)
    assert [shard.tokens for shard in facts(stage).shards] == [tokens] * 3


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_workers_and_kind_of_file(tmp_path: Path, little_units: None) -> None:
    """Catches tokens written in the order in which workers finish, and readers that differ."""
    rows = [text for text in texts(400) if text]
    half = len(rows) // 2
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[half:]))
    files = [parquet(tmp_path / "a.parquet", rows[:half]), lines]
    seen = set()
    for number, (workers, backend) in enumerate(
        [(1, "auto"), (2, "auto"), (7, "auto"), (1, "tiktoken"), (3, "tiktoken")]
    ):
        runtime = {"tokenize_workers": workers, "tokenize_backend": backend}
        stage = tokenize_stage(tmp_path / str(number), files, shard_tokens=1000, runtime=runtime)
        tokenize(stage)
        assert stream(stage) == expected(rows)
        seen.add(json.dumps(hashes(stage)))
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------------- kill and run again

KILLED = """
import sys
from pathlib import Path
import gpt2.tokenize.lines
import gpt2.tokenize.parquet
for loaded in (gpt2.tokenize.parquet, gpt2.tokenize.lines):
    loaded.UNIT_BYTES, loaded.BATCH_BYTES = 4000, 1500
from gpt2.stage.directory import main
from gpt2.tokenize.stage import tokenize
main(tokenize, sys.argv[1:])
"""


def start(stage: StageDir) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(stage.path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_again_and_again(tmp_path: Path, backend: str, little_units: None) -> None:
    """kill -9 at random moments until it is done. Catches tokens lost or repeated where work goes on, a shard that is
    there by name but not whole, skipped rows listed twice, and starting over each time."""
    seed = 1
    rng = random.Random(seed)
    rows: list[str | None] = [*texts(6000)]
    # None in the last unit: when it alone is left it is read in the process itself, where batches are little, and how
    # skipped rows are put together depends on the batches.
    for place in rng.sample(range(len(rows) - 100), 40):
        rows[place] = None
    file = parquet(tmp_path / "a.parquet", rows, row_group_size=100)
    options: dict[str, Any] = {
        "shard_tokens": 4000,
        "on_bad_input": "skip",
        "runtime": {"tokenize_workers": 2, "tokenize_backend": backend},
    }
    undisturbed = tokenize_stage(tmp_path / "one", [file], **options)
    tokenize(undisturbed)
    assert stream(undisturbed) == expected([row for row in rows if row is not None])
    assert sum(entry.rows for entry in facts(undisturbed).skipped) == 40

    stage = tokenize_stage(tmp_path / "two", [file], **options)
    kills = kept_most = 0
    while stage.manifest is None:
        process = start(stage)
        # Let it get to where it writes, then some way further.
        deadline, begun = time.monotonic() + 60, len(list((stage.path / "shards").glob("*.bin")))
        wanted = begun + rng.randrange(1, 30)
        while process.poll() is None and len(list((stage.path / "shards").glob("*.bin"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        output, _ = process.communicate()
        assert process.returncode in (0, -9), f"seed {seed}: {output}"
        kept = re.search(r"(\d+) whole shards of an earlier run are kept", output)
        kept_most = max(kept_most, int(kept[1]) if kept else 0)
    assert hashes(stage) == hashes(undisturbed), f"seed {seed}, {kills} kills"
    assert facts(stage) == facts(undisturbed), f"seed {seed}, {kills} kills"
    assert kills >= 2 and kept_most > 0


def test_whole_shards_are_kept_and_damaged_ones_made_again(tmp_path: Path, little_units: None, capsys: Any) -> None:
    """Catches doing whole shards again after an error, and keeping one that was cut off since."""
    rows: list[str | None] = [*texts(600), None]
    stage = tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", rows)], shard_tokens=1500)
    folder = stage.path / "shards"
    times: list[dict[str, int]] = []
    for _ in range(2):
        with pytest.raises(UserError, match="null instead of text"):
            tokenize(stage)
        times.append({path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())})
        os.truncate(folder / "fineweb_train_000004.bin", 2000)
    assert "tokenize: 4 whole shards of an earlier run are kept, 6,000 tokens" in capsys.readouterr().out
    names = list(times[0])
    assert len(names) > 6 and list(times[1]) == names and all(name.endswith(".bin") for name in names)
    kept = {name for name in names if times[0][name] == times[1][name]}
    assert kept == {"fineweb_val_000000.bin", *(f"fineweb_train_00000{number}.bin" for number in (1, 2, 3))}


def interrupted(monkeypatch: pytest.MonkeyPatch, stage: StageDir, writes: int) -> None:
    """Tokenize until `writes` parts are written."""
    write, done = ShardSequence.write, iter(range(writes))

    def fail_in_the_middle(*arguments: Any) -> None:
        if next(done, None) is None:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardSequence, "write", fail_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            tokenize(stage)
    assert json.loads((stage.path / PROGRESS).read_text())["shards"]


def test_another_division_starts_over(tmp_path: Path, little_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches going on in the middle of units that are not the ones whose tokens were written."""
    rows = texts(300)
    stage = tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", rows, 20)], shard_tokens=1500)
    interrupted(monkeypatch, stage, writes=8)
    monkeypatch.setattr("gpt2.tokenize.parquet.UNIT_BYTES", 9000)
    tokenize(stage)
    assert stream(stage) == expected(rows)


def rewrite(path: Path, content: bytes) -> None:
    """Other content under the old size and mtime."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def jsonl_of(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def test_a_corpus_that_changes_after_download_is_refused(tmp_path: Path) -> None:
    """Catches: other text tokenized under the address of the planned text."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl_of(texts(50)))
    stage = tokenize_stage(tmp_path, [path], val_tokens=100)
    rewrite(path, path.read_bytes().replace(b"o", b"a"))
    with pytest.raises(UserError, match=r"a\.jsonl: its sha256 is not the manifest's"):
        tokenize(stage)


@pytest.mark.parametrize("ends", ["whole", "killed"])
def test_a_corpus_that_changes_while_it_is_read_and_is_restored_gives_no_shards(
    tmp_path: Path, little_units: None, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Catches: shards of the other text kept or recorded, as all hashes agree again when the stage ends."""
    path, rows = tmp_path / "a.jsonl", texts(300)
    path.write_bytes(jsonl_of(rows))
    stage = tokenize_stage(tmp_path, [path], shard_tokens=1500)

    def change(*arguments: Any) -> int:
        rewrite(path, jsonl_of([row.replace(" ", "-") for row in rows]))
        return 10_000

    with monkeypatch.context() as patch:
        patch.setattr("gpt2.tokenize.stage.estimate_tokens", change)
        if ends == "killed":
            interrupted(patch, stage, writes=8)
            rewrite(path, jsonl_of(rows))
        else:
            write_shards = tokenize_module.write_shards

            def restore(*arguments: Any) -> Any:
                whole = write_shards(*arguments)
                rewrite(path, jsonl_of(rows))
                return whole

            patch.setattr("gpt2.tokenize.stage.write_shards", restore)
            with pytest.raises(UserError, match=r"a\.jsonl was changed while the stage read it"):
                tokenize(stage)
            assert stage.manifest is None
    tokenize(stage)
    assert stream(stage) == expected(rows)


# ------------------------------------------------------------------------------------------------------------ refusals


def command(stage: StageDir) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gpt2.tokenize", str(stage.path)], capture_output=True, text=True)


def test_a_corpus_without_training_tokens_is_refused(tmp_path: Path) -> None:
    """Catches a training set of nothing, found out by the loader much later."""
    stage = tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", GOLDEN)], val_tokens=300)
    done = command(stage)
    total = len(expected(GOLDEN))
    assert done.returncode == 2 and stage.manifest is None
    assert re.search(rf"error: .* {total} tokens .* 300", done.stderr)
    assert "Traceback" not in done.stderr


def test_too_little_text_is_said_before_encoding(tmp_path: Path) -> None:
    """Catches: hours of encoding and then an error that the first look at the text could have given."""
    stage = tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", texts(200))], val_tokens=10_000_000)
    with pytest.raises(UserError, match=r"10,000,000.*--val-tokens"):
        tokenize(stage)
    assert not (stage.path / "metrics.jsonl").exists() or not list(read_metrics(stage.path / "metrics.jsonl"))


def test_progress_goes_on_within_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: 100 % after the first piece of a document of 300 MB, and silence after it."""
    text = "all of one document " * 60_000
    units, _ = divide([(str(parquet(tmp_path / "a.parquet", [text])), "a.parquet")], ReadOptions("text"))
    monkeypatch.setattr("gpt2.tokenize.encoder.slices", lambda batch: slices(batch, 100_000))
    parts = list(encode_unit(units[0], ReadOptions("text"), make_encoder("tiktoken")))
    assert len(parts) > 8 and sum(part.consumed for part in parts) == units[0].size
    assert max(part.consumed for part in parts) < units[0].size / 8


def test_a_long_wait_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: silence for minutes while text without white space is encoded as a whole."""
    units, _ = divide([(str(parquet(tmp_path / "a.parquet", texts(9))), "a.parquet")], ReadOptions("text"))
    said = threading.Event()
    lines: list[str] = []

    def note(line: str, **_: Any) -> None:
        lines.append(line)
        if "a.parquet" in line:
            said.set()

    def parts(first: int) -> Iterator[tuple[int, EncodedPart]]:
        assert said.wait(60), lines
        yield from ((0, part) for part in encode_unit(units[0], ReadOptions("text"), make_encoder("tiktoken")))

    monkeypatch.setattr("gpt2.tokenize.progress.print", note, raising=False)
    monkeypatch.setattr(TokenizeProgress, "QUIET_SECONDS", 0.01)
    assert write_shards(ShardStore(tmp_path), units, TokenizeConfig(shard_tokens=50), parts, 0)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_document_over_the_limit_is_bad_input(tmp_path: Path, kind: str) -> None:
    """Catches: one document of hundreds of megabytes in the corpus without a way to refuse it."""
    rows = ["a short one", "é" * 50, "y" * 100, "z" * 101]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet(path, rows)
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    limits = {"max_document_bytes": 100, "val_tokens": 2, "shard_tokens": 50}
    with pytest.raises(UserError, match=r"101 bytes.*tokenize\.max_document_bytes=100"):
        tokenize(tokenize_stage(tmp_path, [path], **limits))
    stage = tokenize_stage(tmp_path, [path], on_bad_input="skip", **limits)
    tokenize(stage)
    assert stream(stage) == expected(rows[:3])
    assert [(entry.rows, entry.file[-len(path.name) :]) for entry in facts(stage).skipped] == [(1, path.name)]


def test_a_limit_that_is_not_set_keeps_whole_shards(tmp_path: Path) -> None:
    """Catches: a new field with a default that starts finished work over."""
    units, _ = divide([(str(parquet(tmp_path / "a.parquet", ["one row"])), "a.parquet")], ReadOptions("text"))
    before = TokenizeConfig().model_dump(exclude={"max_document_bytes"})
    whole = canonical([[unit.model_dump(exclude={"path"}) for unit in units], before])
    assert plan_fingerprint(units, TokenizeConfig()) == hashlib.sha256(whole.encode()).hexdigest()
    assert plan_fingerprint(units, TokenizeConfig(max_document_bytes=9)) != plan_fingerprint(units, TokenizeConfig())


def test_no_such_column_is_one_line(tmp_path: Path) -> None:
    done = command(tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", GOLDEN)], column="body"))
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: data/00000-a.parquet has no column 'body'; it has text: set text_column to one of these\n"
    )


def test_a_disk_that_is_too_small_is_refused_before_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches finding out after hours; the numbers come from the operating system, which is made to say 1 kB."""
    stage = tokenize_stage(tmp_path, [parquet(tmp_path / "a.parquet", texts(300))], shard_tokens=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match=r"need about 0\.\d+ MB and .* has 0\.001 MB free: free 0.\d+ MB more .*runtime.store"
    ):
        tokenize(stage)


@pytest.mark.parametrize("order", ["as they come", "short ones first", "one text many times"])
def test_estimate_is_near(tmp_path: Path, order: str) -> None:
    """Catches stating the disk need of the compressed, or of the first, file; rows taken for equally long; a text that
    the file has once for many rows counted once."""
    rows = texts(4000)
    if order == "short ones first":
        rows[:64] = [row[: len(row) // 3] for row in rows[:64]]
    elif order == "one text many times":
        rows = [max(rows, key=len)] * 4000
    files = [(str(parquet(tmp_path / "a.parquet", rows, row_group_size=4000)), "a.parquet")]
    units, _ = divide(files, ReadOptions("text"))
    about = estimate_tokens(units, ReadOptions("text"), make_encoder("tiktoken"))
    assert about == pytest.approx(len(expected(rows)), rel=0.1)


def test_bad_input_is_listed(tmp_path: Path) -> None:
    rows = [*GOLDEN, None, "after"]
    file = parquet(tmp_path / "a.parquet", rows, row_group_size=4)
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    stage = tokenize_stage(tmp_path, [file, broken], on_bad_input="skip", shard_tokens=100)
    tokenize(stage)
    assert stream(stage) == expected([*GOLDEN, "after"])
    listed = [(entry.file, entry.row_group, entry.rows) for entry in facts(stage).skipped]
    assert listed == [("data/00001-b.parquet", None, 0), ("data/00000-a.parquet", 2, 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_worker_process_ends_the_stage(tmp_path: Path, count: int, little_units: None) -> None:
    """Catches waiting for ever for a process that the operating system ended."""
    path = tmp_path / "a.txt"
    path.write_text("word " * 2_000_000)
    pool = ProcessPool(count, ReadOptions("text"), "tiktoken")
    unit = WorkUnit(path=str(path), name="a.txt", kind="txt", first=0, last=10**7, size=10**7)
    results = pool.run(unit)
    next(results)
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"ended by SIGKILL while it read a.txt; run again, whole shards are kept"):
        list(results)
    pool.close()


def test_errors_cross_from_worker_processes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 1}\n' + (json.dumps({"text": "more " * 200}) + "\n") * 20_000)
    stage = tokenize_stage(tmp_path, [path], runtime={"tokenize_workers": 2}, shard_tokens=1000)
    done = command(stage)
    assert done.returncode == 2 and done.stderr.startswith("error: data/00000-a.jsonl, line 2: int instead of text")


# ------------------------------------------------------------------------------------------------- ready-made shards


def shard(path: Path, tokens: list[int]) -> Path:
    with ShardWriter(path) as writer:
        writer.write(np.array(tokens, dtype=np.uint16))
    return path


def test_ready_made_shards_are_linked(tmp_path: Path) -> None:
    """Catches a second copy of 20 GB, a wrong order, and names that the loader does not know."""
    files = [shard(tmp_path / f"x_{name}.bin", tokens) for name, tokens in
             (("train_000001", [EOT, 1]), ("train_000002", [2, 3, 4]), ("val_000000", [EOT, 9]))]  # fmt: skip
    stage = tokenize_stage(tmp_path, files, kind="local-shards", prefix="own")
    tokenize(stage)
    result = facts(stage)
    assert [(s.path, s.split, s.tokens) for s in result.shards] == [
        ("shards/own_val_000000.bin", "val", 2),
        ("shards/own_train_000001.bin", "train", 2),
        ("shards/own_train_000002.bin", "train", 3),
    ]
    assert (result.documents, result.val_tokens, result.train_tokens, result.backend) == (None, 2, 5, "ready-made")
    assert os.path.samefile(stage.path / "shards/own_val_000000.bin", files[2])
    assert stream(stage) == [EOT, 9, EOT, 1, 2, 3, 4]


def test_ready_made_shards_that_cannot_be_used(tmp_path: Path) -> None:
    good = [shard(tmp_path / "x_val_0.bin", [EOT]), shard(tmp_path / "x_train_1.bin", [EOT, 50257])]
    with pytest.raises(UserError, match="holds token 50,257; GPT-2's vocabulary ends at 50,256"):
        tokenize(tokenize_stage(tmp_path, good, kind="local-shards"))
    with pytest.raises(UserError, match="1 of 1 shards"):
        tokenize(tokenize_stage(tmp_path, good[:1], kind="local-shards"))


def test_a_ready_made_shard_that_changes_while_it_is_adopted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: other tokens recorded under the address of the planned ones."""
    files = [shard(tmp_path / "x_val_0.bin", [EOT, 5]), shard(tmp_path / "x_train_1.bin", [EOT, 7])]
    stage = tokenize_stage(tmp_path, files, kind="local-shards")
    verify = import_shards.verify

    def change(path: Path) -> Any:
        rewrite(files[1], files[1].read_bytes().replace(b"\x07", b"\x08"))
        return verify(path)

    monkeypatch.setattr("gpt2.tokenize.import_shards.verify", change)
    with pytest.raises(UserError, match=r"x_train_1\.bin was changed while the stage read it"):
        tokenize(stage)
    assert stage.manifest is None


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_fineweb_rows_agree_with_their_own_count(tmp_path: Path) -> None:
    """FineWeb's own token_count was made by others with GPT-2's tokenizer: 291 of 300 rows agree exactly. In each of
    the other nine an e-mail address was made anonymous after the tokens had been counted."""
    table = pq.read_table(DATA / "fineweb_300.parquet", columns=["text", "token_count"]).to_pydict()
    stage = tokenize_stage(tmp_path, [DATA / "fineweb_300.parquet"], shard_tokens=10_000)
    tokenize(stage)
    tokens = np.array(stream(stage))
    starts = np.flatnonzero(tokens == EOT)
    counts = np.diff(np.append(starts, len(tokens))) - 1
    others = [
        text for text, ours, theirs in zip(table["text"], counts, table["token_count"], strict=True) if ours != theirs
    ]
    assert len(others) == 9
    assert all("email@example.com" in text or "firstname.lastname@example.org" in text for text in others)
    assert sha256_file(stage.path / facts(stage).shards[0].path) == hashes(stage)[facts(stage).shards[0].path]
