"""gpt2.tokenize.cluster: a Dask cluster of local processes writes the bytes of a single process."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_stages import expected, stream, tokenize_stage

from gpt2.config.run import TokenizeConfig
from gpt2.errors import UserError
from gpt2.shards import open_shard
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TokenizeFacts
from gpt2.stage.manifest import sha256_file
from gpt2.tokenize.shard_store import OutputFacts
from gpt2.tokenize.stage import tokenize

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("parquet", "lines"):
        monkeypatch.setattr(f"gpt2.tokenize.{module}.UNIT_BYTES", 20_000)


def corpus(path: Path, rows: int = 12_000) -> tuple[Path, list[str]]:
    rng = random.Random(3)
    words = ["the", "Zürich", "don't", "42", "\n\n", "東京", "tokens,", "x" * 40]
    texts = [" ".join(rng.choices(words, k=rng.randrange(100))) for _ in range(rows)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=60)
    return path, texts


def hashes(stage: StageDir) -> list[str]:
    assert stage.manifest is not None
    return [entry.sha256 for entry in stage.manifest.files]


def test_killed_workers_lose_or_repeat_no_tokens(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, two of them killed while they work. Catches tokens lost with a worker, written twice when its
    units are done again, or put in the order in which workers finish, and files of others that are removed with the
    parts."""
    file, texts = corpus(tmp_path / "a.parquet")
    alone = tokenize_stage(tmp_path / "alone", [file], shard_tokens=20_000)
    tokenize(alone)
    (tmp_path / "handed").mkdir()
    (tmp_path / "handed/thesis.txt").write_text("mine")
    runtime = {"cluster": cluster.scheduler_address, "cluster_parts": str(tmp_path / "handed")}
    stage = tokenize_stage(tmp_path / "cluster", [file], shard_tokens=20_000, runtime=runtime)
    with distributed.Client(cluster.scheduler_address) as client:
        client.wait_for_workers(3)
        first, second, _ = client.run(os.getpid).values()
        victims = {"000003.bin": first, "000010.bin": second}
        killed: list[int] = []

        def kill(folder: Any, name: str) -> None:
            # The work is never more than a few shards ahead of the one that is kept, so most of it is to be done yet.
            for ending in [ending for ending in victims if name.endswith(ending)]:
                os.kill(victims[ending], signal.SIGKILL)
                killed.append(victims[ending])

        monkeypatch.setattr("gpt2.tokenize.shard_store.ShardStore.keep", kill)
        tokenize(stage)
        client.wait_for_workers(3)
        assert sorted(killed) == sorted([first, second])
        assert not {first, second} & set(client.run(os.getpid).values())
    assert len(hashes(stage)) > 20, "the second has to be killed long before the end: give it more text"
    assert hashes(stage) == hashes(alone)
    assert stream(stage) == expected(texts)
    assert stage.facts(TokenizeFacts).backend == alone.facts(TokenizeFacts).backend
    assert [path.name for path in (tmp_path / "handed").iterdir()] == ["thesis.txt"]


DRIVER = """
import os, sys, time
from gpt2.tokenize import cluster, parquet
parquet.UNIT_BYTES = 20_000
last, *arguments = sys.argv[1:]
keep = cluster.RemoteShardStore.keep
def kept(folder, name):
    if name.endswith(last):
        open(os.environ["TMPDIR"] + "/reached", "w").close()
        time.sleep(1000)
    keep(folder, name)
cluster.RemoteShardStore.keep = kept
cluster.main(arguments)
"""


def test_a_killed_driver_resumes_without_a_gap(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL twice, each time while a shard is on its way and later ones have arrived. Catches a shard that is left
    out because those after it were there, starting over, and what a killed run leaves lying about."""
    file, texts = corpus(tmp_path / "a.parquet")
    alone = tokenize_stage(tmp_path / "alone", [file], shard_tokens=20_000)
    tokenize(alone)
    scratch, output = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    options = ["--scheduler", cluster.scheduler_address, "--output", f"file://{output}", "--shard-tokens", "20000"]
    for last in (4, 12):
        (scratch / "reached").unlink(missing_ok=True)
        later = output / f"shards/fineweb_train_{last + 1:06d}.bin"
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, f"{last:06d}.bin", *options, f"file://{file}"])
        deadline = time.monotonic() + 120
        while not ((scratch / "reached").exists() and later.exists()):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        assert not (output / "facts.json").exists()
    command = [sys.executable, "-c", DRIVER, "never", *options, f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = re.search(r"(\d+) whole shards of an earlier run are kept", done.stdout)
    assert kept is not None and 4 < int(kept[1]) <= 12  # the last may not have been written down yet
    assert sorted(path.name for path in output.iterdir()) == ["facts.json", "shards"]
    made = {f"shards/{path.name}": sha256_file(path) for path in (output / "shards").iterdir()}
    assert alone.manifest is not None
    assert made == {entry.path: entry.sha256 for entry in alone.manifest.files}
    assert stream(alone) == expected(texts)


def test_from_addresses_to_an_address(tmp_path: Path, cluster: Any) -> None:
    """Catches local paths where addresses are meant, whole shards done again, and parts that are left behind."""
    from gpt2.tokenize.cluster import tokenize_to
    from gpt2.tokenize.dask_encode import connect

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
    assert OutputFacts.model_validate_json((output / "facts.json").read_text()) == facts
    tokens = [token for shard in facts.shards for token in open_shard(output / shard.path).tolist()]
    assert tokens == expected(texts)
    assert {path.name for path in (output / "shards").iterdir()} == {Path(shard.path).name for shard in facts.shards}


def test_a_unit_that_no_worker_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches trying for ever. Reading the address `deadly://` ends the process that does it."""
    from gpt2.tokenize import dask_encode as module
    from gpt2.tokenize.dask_encode import encode_on_cluster
    from gpt2.tokenize.reading import ReadOptions, WorkUnit

    (tmp_path / "deadly.py").write_text(
        "import os, fsspec\n"
        "class Deadly(fsspec.AbstractFileSystem):\n"
        "    protocol = 'deadly'\n"
        "    def open(self, *a, **k): os._exit(1)\n"
        "fsspec.register_implementation('deadly', Deadly)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # passed on to processes that are spawned
    monkeypatch.setattr(module, "MAX_LOST_WORKERS", 1)
    unit = WorkUnit(path="deadly://x", name="x.txt", kind="txt", first=0, last=1, size=1)
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.register_plugin(_Preload())
        with pytest.raises(UserError, match=r"x\.txt \(unit 0\) .* 1 Dask workers"):
            list(encode_on_cluster(client, [unit], ReadOptions("text"), "tiktoken", 0, str(tmp_path / "parts")))


class _Preload(distributed.WorkerPlugin):  # type: ignore[misc,name-defined]
    def setup(self, worker: Any) -> None:
        __import__("deadly")


def test_a_scheduler_that_does_not_answer_is_named() -> None:
    from gpt2.tokenize import dask_encode as module

    module.CONNECT_SECONDS, before = 2, module.CONNECT_SECONDS
    try:
        with (
            pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"),
            module.connect("tcp://127.0.0.1:9"),
        ):
            pass
    finally:
        module.CONNECT_SECONDS = before


def test_the_command_line_writes_an_output_and_reports_missing_inputs(tmp_path: Path) -> None:
    file, texts = corpus(tmp_path / "a.parquet", rows=500)
    command = [
        sys.executable,
        "-m",
        "gpt2.tokenize.cluster",
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
    done = subprocess.run([*command, str(tmp_path / "*.parquet")], capture_output=True, text=True)
    assert done.returncode == 0 and f"tokenize: {tmp_path / 'out'} is finished already" in done.stdout
    done = subprocess.run([*command, str(tmp_path / "*.jsonl")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: no file matches {tmp_path}/*.jsonl: correct the pattern\n")


def test_the_flow_on_a_cluster_writes_the_same_tokens(tmp_path: Path, cluster: Any, prefect_server: None) -> None:
    """The flow on a running cluster, through prefect-dask."""
    from prefect_dask import DaskTaskRunner

    from flows.cluster import tokenize_on_cluster

    file, texts = corpus(tmp_path / "a.parquet", rows=2000)
    run = tokenize_on_cluster.with_options(task_runner=DaskTaskRunner(address=cluster.scheduler_address))
    facts = run([str(file)], str(tmp_path / "out"), TokenizeConfig(shard_tokens=20_000))
    assert facts.train_tokens + facts.val_tokens == len(expected(texts))
    tokens = [token for shard in facts.shards for token in open_shard(tmp_path / "out" / shard.path).tolist()]
    assert tokens == expected(texts)
