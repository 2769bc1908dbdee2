"""gpt2.cluster: several machines' worth of processes, and the bytes of one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_stages import expected, stream, tokenize_stage

from gpt2.config import TokenizeConfig
from gpt2.errors import UserError
from gpt2.manifest import TokenizeFacts
from gpt2.shards import open_shard
from gpt2.stage import StageDir
from gpt2.tokenize import tokenize

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("corpus_parquet", "corpus_lines"):
        monkeypatch.setattr(f"gpt2.{module}.UNIT_BYTES", 20_000)


def corpus(path: Path, rows: int = 12_000) -> tuple[Path, list[str]]:
    rng = random.Random(3)
    words = ["the", "Zürich", "don't", "42", "\n\n", "東京", "tokens,", "x" * 40]
    texts = [" ".join(rng.choices(words, k=rng.randrange(100))) for _ in range(rows)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=60)
    return path, texts


def hashes(stage: StageDir) -> list[str]:
    assert stage.manifest is not None
    return [entry.sha256 for entry in stage.manifest.files]


def test_workers_killed_midway(tmp_path: Path, cluster: Any) -> None:
    """Three processes, two of them killed while they work. Catches tokens lost with a worker, written twice when its
    units are done again, or put in the order in which workers finish."""
    file, texts = corpus(tmp_path / "a.parquet")
    alone = tokenize_stage(tmp_path / "alone", [file], shard_tokens=20_000)
    tokenize(alone)
    runtime = {"cluster": cluster.scheduler_address}
    stage = tokenize_stage(tmp_path / "cluster", [file], shard_tokens=20_000, runtime=runtime)
    victims: list[int] = []
    done = threading.Event()

    def kill() -> None:
        with distributed.Client(cluster.scheduler_address) as client:
            for shards in (3, 10):
                while len(list((stage.path / "shards").glob("*.bin"))) < shards and not done.is_set():
                    time.sleep(0.002)
                pids = [pid for pid in client.run(os.getpid).values() if pid not in victims]
                if not done.is_set() and pids:
                    victims.append(pids[0])
                    os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        tokenize(stage)
    finally:
        done.set()
        killer.join()
    assert victims, "it was done before anything could be killed: give it more text"
    assert hashes(stage) == hashes(alone)
    assert stream(stage) == expected(texts)
    assert not (stage.path / "parts").exists()


def test_from_addresses_to_an_address(tmp_path: Path, cluster: Any) -> None:
    """Catches local paths where addresses are meant, whole shards done again, and parts that are left behind."""
    from gpt2.cluster import connect, tokenize_to

    file, texts = corpus(tmp_path / "a.parquet", rows=3000)
    output, config = tmp_path / "out", TokenizeConfig(shard_tokens=20_000)
    with connect(cluster.scheduler_address) as client:
        broken = tmp_path / "b.parquet"
        pq.write_table(pa.table({"text": ["fine", None]}), broken)
        inputs = [f"file://{file}", f"file://{broken}"]
        with pytest.raises(UserError, match=r"b.parquet, row group 0, row 1: null instead of text"):
            tokenize_to(client, inputs, f"file://{output}", config, "text")
        whole = {path: path.stat().st_mtime_ns for path in (output / "shards").iterdir()}
        assert len(whole) > 3 and not (output / "facts.json").exists()
        os.utime(output / "shards/fineweb_train_000001.bin", ns=(7, 7))
        with pytest.raises(UserError, match="null instead of text"):
            tokenize_to(client, inputs, f"file://{output}", config, "text")
        assert (output / "shards/fineweb_train_000001.bin").stat().st_mtime_ns == 7
        facts = tokenize_to(client, inputs[:1], f"file://{output}", config, "text")
    assert sorted(path.name for path in output.iterdir()) == ["facts.json", "shards"]
    assert TokenizeFacts.model_validate_json((output / "facts.json").read_text()) == facts
    tokens = [token for shard in facts.shards for token in open_shard(output / shard.path).tolist()]
    assert tokens == expected(texts)
    assert {path.name for path in (output / "shards").iterdir()} == {Path(shard.path).name for shard in facts.shards}


def test_a_unit_that_no_worker_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches trying for ever. Reading the address `deadly://` ends the process that does it."""
    from gpt2 import cluster as module
    from gpt2.cluster import encoded_on
    from gpt2.corpus import Reading, Unit

    (tmp_path / "deadly.py").write_text(
        "import os, fsspec\n"
        "class Deadly(fsspec.AbstractFileSystem):\n"
        "    protocol = 'deadly'\n"
        "    def open(self, *a, **k): os._exit(1)\n"
        "fsspec.register_implementation('deadly', Deadly)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # passed on to processes that are spawned
    monkeypatch.setattr(module, "LOST_WORKERS", 1)
    unit = Unit(path="deadly://x", name="x.txt", kind="txt", first=0, last=1, size=1)
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.register_plugin(_Preload())
        with pytest.raises(UserError, match=r"workers and more were lost over x.txt \(unit 0\)"):
            list(encoded_on(client, [unit], Reading("text"), "tiktoken", 0, str(tmp_path / "parts")))


class _Preload(distributed.WorkerPlugin):  # type: ignore[misc,name-defined]
    def setup(self, worker: Any) -> None:
        __import__("deadly")


def test_nobody_there() -> None:
    from gpt2 import cluster as module

    module.CONNECT_SECONDS, before = 2, module.CONNECT_SECONDS
    try:
        with (
            pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"),
            module.connect("tcp://127.0.0.1:9"),
        ):
            pass
    finally:
        module.CONNECT_SECONDS = before


def test_command(tmp_path: Path) -> None:
    file, texts = corpus(tmp_path / "a.parquet", rows=500)
    command = [
        sys.executable,
        "-m",
        "gpt2.cluster",
        "--scheduler",
        "local:2",
        "--output",
        str(tmp_path / "out"),
        "--shard-tokens",
        "5000",
    ]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards = sorted((tmp_path / "out/shards").iterdir(), key=lambda path: path.name.split("_")[-1])
    assert [token for shard in shards for token in open_shard(shard).tolist()] == expected(texts)
    done = subprocess.run([*command, str(tmp_path / "none.parquet")], capture_output=True, text=True)
    assert done.returncode == 2 and "error: data file none.parquet is missing" in done.stderr


def test_through_prefect(tmp_path: Path, cluster: Any, prefect_server: None) -> None:
    """The flow on a running cluster, through prefect-dask."""
    from prefect_dask import DaskTaskRunner

    from flows.cluster import tokenize_on_cluster

    file, texts = corpus(tmp_path / "a.parquet", rows=2000)
    run = tokenize_on_cluster.with_options(task_runner=DaskTaskRunner(address=cluster.scheduler_address))
    facts = run([str(file)], str(tmp_path / "out"), TokenizeConfig(shard_tokens=20_000))
    assert facts.train_tokens + facts.val_tokens == len(expected(texts))
    tokens = [token for shard in facts.shards for token in open_shard(tmp_path / "out" / shard.path).tolist()]
    assert tokens == expected(texts)
