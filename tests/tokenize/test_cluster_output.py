"""gpt2.tokenize.cluster without a cluster: what happens to output, parts and progress when something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_stages import expected

from gpt2.config.run import TokenizeConfig
from gpt2.errors import UserError
from gpt2.shards import open_shard
from gpt2.tokenize import dask_encode as module
from gpt2.tokenize.cluster import expand, main, tokenize_to
from gpt2.tokenize.dask_encode import connect, encode_on_cluster
from gpt2.tokenize.reading import ReadOptions, WorkUnit
from gpt2.tokenize.shard_sequence import MAX_PENDING, ShardSequence
from gpt2.tokenize.shard_store import PROGRESS, OutputFacts, RemoteShardStore, ShardStore, file_system, version_of

pytest.importorskip("distributed")
CONFIG = TokenizeConfig(shard_tokens=2000)
TEXTS = [f"row {number} " + "abc def " * 20 for number in range(400)]


class Future:
    def __init__(self, result: Callable[[], Any]) -> None:
        self.result = result

    def cancel(self) -> None:
        pass


class Client:
    """Runs submitted calls in this process; `changed` overrides fields of their results."""

    def __init__(self, changed: dict[str, Any] | None = None, *, workers: int = 2, seconds: float = 0) -> None:
        self.changed, self.workers, self.seconds, self.submitted = changed or {}, workers, seconds, 0

    def nthreads(self) -> dict[str, int]:
        return {str(number): 1 for number in range(self.workers)}

    def submit(self, function: Callable[..., dict[str, Any]], *arguments: Any, **_: Any) -> Future:
        self.submitted += 1

        def result() -> dict[str, Any]:
            time.sleep(self.seconds)
            return function(*arguments) | self.changed

        return Future(result)


@pytest.fixture(autouse=True)
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2.tokenize.parquet.UNIT_BYTES", 5000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    table = pa.table({"text": TEXTS, "other": [text.upper() for text in TEXTS]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    return tmp_path / "a.parquet"


def state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def tokens(output: Path, facts: OutputFacts) -> list[int]:
    return [token for shard in facts.shards for token in open_shard(output / shard.path).tolist()]


# ------------------------------------------------------------------------------------------------------ what is kept

STREAM = np.arange(1000, dtype=np.uint16)


def sequence(folder: ShardStore) -> bytes:
    """Ten shards; their bytes."""
    shards = ShardSequence(folder, "f", "plan", 100, 100)
    try:
        for unit in range(shards.start.unit, 10):
            shards.write(unit, STREAM[100 * unit : 100 * unit + 100])
        whole = shards.finish(10)
    except BaseException:
        shards.discard()
        raise
    return b"".join((folder.path / shard.path).read_bytes() for shard in whole)


def test_a_shard_that_fails_once_leaves_no_hole(tmp_path: Path) -> None:
    """Catches writing down the shards after one that failed, so that the next run goes on behind the hole."""
    undisturbed = sequence(ShardStore(tmp_path / "one"))

    class Failing(ShardStore):
        def keep(self, name: str) -> None:
            if name.endswith("000002.bin"):
                time.sleep(0.3)  # those that follow are whole before it fails
                raise OSError("upload failed")

    with pytest.raises(OSError, match="upload failed"):
        sequence(Failing(tmp_path / "two"))
    folder = ShardStore(tmp_path / "two")
    progress = folder.read_progress()
    assert progress is not None and len(progress.shards) == 2
    assert sequence(folder) == undisturbed


def test_a_hole_in_progress_is_not_believed(tmp_path: Path) -> None:
    """Catches going on after a list of shards that lacks one."""
    undisturbed, folder = sequence(ShardStore(tmp_path)), ShardStore(tmp_path)
    progress = folder.read_progress()
    assert progress is not None
    folder.write_progress(progress.model_copy(update={"shards": progress.shards[:3] + progress.shards[4:]}))
    assert len(ShardSequence(folder, "f", "plan", 100, 100).shards) == 3
    assert sequence(folder) == undisturbed


def test_a_finished_output_is_left_alone(tmp_path: Path, file: Path) -> None:
    """Catches deleting everything when the same command runs again, and shards of another column under one name."""
    output = tmp_path / "out"
    facts = tokenize_to(Client(), [str(file)], str(output), CONFIG, "text")
    assert tokens(output, facts) == expected(TEXTS)
    before, client = state(output), Client()
    assert tokenize_to(client, [str(file)], str(output), CONFIG, "text") == facts
    assert state(output) == before and client.submitted == 0
    for config, column in ((CONFIG, "other"), (TokenizeConfig(shard_tokens=2500), "text")):
        with pytest.raises(UserError, match=r"finished shards of other inputs, .*: name another --output, or delete"):
            tokenize_to(client, [str(file)], str(output), config, column)
    assert state(output) == before
    (output / "shards/fineweb_train_000002.bin").unlink()
    with pytest.raises(UserError, match=r"was finished, and now shards/fineweb_train_000002.bin is missing: name"):
        tokenize_to(client, [str(file)], str(output), CONFIG, "text")


def test_only_our_own_is_removed(tmp_path: Path, file: Path) -> None:
    """Catches removing files of others from the output, and from the folder that parts are handed over in."""
    output = tmp_path / "out"
    (output / "parts").mkdir(parents=True)
    (output / "shards").mkdir()
    others = [output / name for name in ("shards/mine.bin", "shards/web_train_000001.bin", "parts/mine", "mine")]
    ours = [output / "shards" / name for name in ("fineweb_train_000077.bin", "fineweb_val_000000.bin.tmp")]
    for path in (*others, *ours):
        path.write_text("x")
    tokenize_to(Client(), [str(file)], str(output), CONFIG, "text")
    assert all(path.exists() for path in others) and not any(path.exists() for path in ours)
    assert sorted(path.name for path in output.iterdir()) == ["facts.json", "mine", "parts", "shards"]
    unit = WorkUnit(path=str(file), name="a", kind="parquet", first=0, last=1, size=1)
    (output / "parts" / f"part-{'0' * 32}").write_text("of a run that was killed")
    assert list(encode_on_cluster(Client(), [unit], ReadOptions("text"), "tiktoken", 0, str(output / "parts")))
    assert [path.name for path in (output / "parts").iterdir()] == ["mine"]


def test_shards_of_another_column_are_not_resumed(tmp_path: Path, file: Path) -> None:
    """Catches going on in whole shards of another column, the units of which look the same."""
    output = tmp_path / "out"

    class Stopped(Client):
        def submit(self, *arguments: Any, **options: Any) -> Future:
            if self.submitted == 8:
                raise OSError("stopped")
            return super().submit(*arguments, **options)

    with pytest.raises(OSError, match="stopped"):
        tokenize_to(Stopped(), [str(file)], str(output), CONFIG, "text")
    assert len(json.loads((output / PROGRESS).read_text())["shards"]) > 1
    facts = tokenize_to(Client(), [str(file)], str(output), CONFIG, "other")
    assert tokens(output, facts) == expected([text.upper() for text in TEXTS])


def test_torn_progress_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches removing every whole shard because progress.json was cut off, and writing it so that it can be."""

    class Torn(RemoteShardStore):
        def keep(self, name: str) -> None:
            super().keep(name)
            if name.endswith("000009.bin"):
                raise OSError("stop here")

    scratch, output = tmp_path / "scratch", tmp_path / "out"
    with pytest.raises(OSError, match="stop here"):
        sequence(Torn(scratch, str(output)))
    whole = (output / PROGRESS).read_bytes()
    folder = RemoteShardStore(scratch, str(output))
    progress = folder.read_progress()
    assert progress is not None and len(progress.shards) == 9

    def killed(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder._fs, "pipe_file", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.write_progress(progress)
    assert (output / PROGRESS).read_bytes() == whole
    (output / PROGRESS).write_bytes(whole[: len(whole) // 2])
    before = state(output)
    with pytest.raises(UserError, match=r"out/progress.json is not a valid ResumeState"):
        ShardSequence(folder, "f", "plan", 100, 100)
    assert state(output) == before


# ------------------------------------------------------------------------------------------------------------ workers


def test_a_worker_with_another_tiktoken_is_refused(tmp_path: Path, file: Path) -> None:
    """Catches tokens of two versions in one stream."""
    with pytest.raises(UserError, match=r"the worker on \S+ has tiktoken 0.1.2, this process \d+\.\d+\.\d+, and"):
        tokenize_to(Client({"tiktoken": "0.1.2"}), [str(file)], str(tmp_path / "out"), CONFIG, "text")


def test_a_worker_without_the_fast_encoder(tmp_path: Path, file: Path, capsys: Any) -> None:
    """Catches facts that tell what the driver has, and a slow cluster for no visible reason."""
    client = Client({"encoder": "tiktoken 9", "host": "node7"})
    facts = tokenize_to(client, [str(file)], str(tmp_path / "out"), CONFIG, "text")
    assert facts.backend == "tiktoken 9"
    assert capsys.readouterr().out.count("the first on node7") == 1


def test_no_worker_is_said(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches waiting without a word for workers that are gone."""
    monkeypatch.setattr(module, "NO_WORKER_SECONDS", 0.12)
    unit = WorkUnit(path=str(file), name="a", kind="parquet", first=0, last=1, size=1)
    for workers in (0, 2):
        client = Client(workers=workers, seconds=0.8)
        assert list(encode_on_cluster(client, [unit], ReadOptions("text"), "tiktoken", 0, str(tmp_path / "parts")))
        said = capsys.readouterr().out
        assert ("tokenize: no worker for 0 s, waiting\n" in said) == (workers == 0)


# ------------------------------------------------------------------------------------------------------------- inputs


def changed_in_place(file: Path) -> None:
    """Other rows under the same name, size and mtime."""
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b"abc", b"xyz"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size


def test_a_finished_output_of_changed_inputs_is_refused(tmp_path: Path) -> None:
    """Catches: "finished already" for inputs of the same name and size that hold other text, or lie elsewhere."""
    (first := tmp_path / "one" / "a.txt").parent.mkdir()
    first.write_text("abc def " * 2000)
    (second := tmp_path / "two" / "a.txt").parent.mkdir()
    shutil.copy2(first, second)
    output = str(tmp_path / "out")
    facts = tokenize_to(Client(), [str(first)], output, CONFIG, "text")
    assert tokenize_to(Client(), [str(first)], output, CONFIG, "text") == facts
    with pytest.raises(UserError, match="finished shards of other inputs"):
        tokenize_to(Client(), [str(second)], output, CONFIG, "text")
    changed_in_place(first)
    with pytest.raises(UserError, match="finished shards of other inputs"):
        tokenize_to(Client(), [str(first)], output, CONFIG, "text")


def test_an_input_that_changes_while_it_is_read_finishes_nothing(tmp_path: Path) -> None:
    """Catches: an output of mixed text marked as that of the later input."""
    (text := tmp_path / "a.txt").write_text("abc def " * 2000)

    class Changing(Client):
        def submit(self, function: Callable[..., dict[str, Any]], *arguments: Any, **more: Any) -> Future:
            changed_in_place(text)
            return super().submit(function, *arguments, **more)

    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        tokenize_to(Changing(), [str(text)], str(tmp_path / "out"), CONFIG, "text")
    assert not (tmp_path / "out" / "facts.json").exists()


def test_remote_files_are_told_apart_by_etag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: objects of the same name and size in a bucket taken for each other."""
    system, path = file_system("memory://bucket/a.txt")
    system.pipe_file(path, b"text")
    info = system.info(path) | {"created": None}
    versions = []
    for etag in ("one", "one", "two"):
        monkeypatch.setattr(type(system), "info", lambda self, path, etag=etag: info | {"ETag": etag})
        versions.append(version_of("memory://bucket/a.txt"))
    assert versions[0] == versions[1] != versions[2]


# ---------------------------------------------------------------------------------------------------------- addresses


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path, file: Path) -> None:
    """Catches a pattern taken for a file's name, and a file whose name looks like a pattern."""
    odd = tmp_path / "b[1].parquet"
    shutil.copy(file, odd)
    assert expand([f"{tmp_path}/*.parquet"]) == [str(file), str(odd)]
    assert expand([f"file://{tmp_path}/*.parquet"]) == [f"file://{file}", f"file://{odd}"]
    assert expand([str(odd), "none.parquet"]) == [str(odd), "none.parquet"]
    with pytest.raises(UserError, match=r"no file matches .*/\*.jsonl"):
        tokenize_to(Client(), [f"{tmp_path}/*.jsonl"], str(tmp_path / "out"), CONFIG, "text")


def test_packages_that_are_missing(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tracebacks for addresses that nothing here can reach."""

    def missing(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(UserError, match=r"nope://x .*nope"):
        file_system("nope://x")
    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    for inputs, output in ((["s3://b/a.parquet"], "out"), ([str(file)], "s3://b/out")):
        with pytest.raises(UserError, match="Install s3fs"):
            tokenize_to(Client(), inputs, output, CONFIG, "text")


def test_a_full_output_or_scratch_folder_is_refused_before_encoding(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches finding out after hours that the output, or the folder that shards pass through, is full."""
    free = {"out": 10**9, "scratch": 10**9}
    assert RemoteShardStore(tmp_path, "memory://x").free() is None

    def usage(path: Path) -> Any:
        number = free["scratch" if "tokenize-" in str(path) else "out"]
        return shutil._ntuple_diskusage(10**9, 10**9 - number, number)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free["out"] = 1000
    with pytest.raises(UserError, match=rf"need about .* and {tmp_path}/out has 0.001 MB free"):
        tokenize_to(Client(), [str(file)], f"file://{tmp_path}/out", CONFIG, "text")
    free.update(out=10**9, scratch=1000)
    with pytest.raises(UserError, match=rf"up to {MAX_PENDING + 1} shards, .* MB are free: set TMPDIR"):
        tokenize_to(Client(), [str(file)], f"file://{tmp_path}/out", CONFIG, "text")


def test_a_small_corpus_names_an_option_that_exists(tmp_path: Path, file: Path, capsys: Any) -> None:
    """Catches: everything encoded before the error, which then names an option of recipes only."""
    client = Client()
    with pytest.raises(UserError, match="--val-tokens") as caught:
        tokenize_to(client, [str(file)], str(tmp_path / "out"), TokenizeConfig(), "text", "tiktoken")
    assert "100,000,000" in str(caught.value) and client.submitted == 0
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--val-tokens" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["local:x", "local:", "local:0"])
def test_a_local_cluster_needs_a_number(address: str) -> None:
    """Bug: a traceback about int()."""
    with pytest.raises(UserError, match=f"{address} is no cluster"), connect(address):
        pass
