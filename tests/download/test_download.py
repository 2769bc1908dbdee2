"""The download stage against a fake Hub (hub_server.py), in this process and as a task starts it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hub_server import REVISION, Dataset, Fault, HubServer
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from gpt2.config.runtime import Runtime
from gpt2.config.sources import HubFiles, HubShards, LocalFiles
from gpt2.download import hub_download
from gpt2.download.retries import Retrier, RetryPolicy
from gpt2.download.sources import SHARD_FORMATS, TEXT_FORMATS, fetch, identify
from gpt2.download.stage import DownloadProgress
from gpt2.errors import UserError
from gpt2.plan import prepare
from gpt2.stage.facts import DownloadFacts
from gpt2.stage.manifest import Manifest, Request, read_model
from gpt2.stage.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.slow  # faults take their time-outs

REPO = "someone/texts"
QUICK = RetryPolicy(max_tries=4, initial_backoff=0.02, max_backoff=0.05)


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


FILES = {
    "README.md": b"# Texts\n",
    "sample/b.parquet": content(2, 300_000),
    "sample/a.parquet": content(1, 200_000),
    "sample/deep/c.parquet": content(3, 100_000),
    "sample/notes.txt": b"one document\n",
    "other/d.jsonl": b'{"text": "d"}\n' * 100,
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as running:
        running.datasets[REPO] = Dataset(dict(FILES))
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        yield running


def source(*patterns: str, repo: str = REPO, revision: str = REVISION) -> HubFiles:
    return HubFiles(repo=repo, revision=revision, files=patterns or ("sample/*.parquet",))


def get(
    wanted: HubFiles | HubShards, directory: Path, workers: int = 2, retry_policy: RetryPolicy = QUICK
) -> list[bytes]:
    """Download in this process; the files' bytes in reading order."""
    formats = TEXT_FORMATS if isinstance(wanted, HubFiles) else SHARD_FORMATS
    names = hub_download.download(
        wanted, formats, directory, workers=workers, progress=lambda done, total, files: None, retry_policy=retry_policy
    )
    return [(directory / name).read_bytes() for name in names]


def prepare_stage(wanted: HubFiles | HubShards | LocalFiles, store: Path) -> Path:
    identity, hints = identify(wanted, store)
    request = Request(stage="download", version=1, config={"source": identity}, hints={"source": hints})
    return prepare(request, Runtime(store=store, download_workers=2))


def environment(server: HubServer, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = {"HF_HOME": str(tmp_path / "hf-home"), "HF_ENDPOINT": server.url, "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    return kept | home | {"NO_PROXY": "127.0.0.1"} | more


def run(directory: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpt2.download", str(directory)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


# -------------------------------------------------------------------------------------------------------- it downloads


def test_the_fake_hub_serves_huggingface_hubs_own_client(server: HubServer, tmp_path: Path) -> None:
    """Catches: a fake that only our own code understands, so that the tests below would prove nothing."""
    server.page = 2
    program = f"""
import hashlib, json, sys
from huggingface_hub import HfApi, hf_hub_download
at = dict(repo_type="dataset", revision={REVISION!r})
files = [item for item in HfApi().list_repo_tree({REPO!r}, recursive=True, **at) if hasattr(item, "size")]
for item in files:
    data = open(hf_hub_download({REPO!r}, item.path, local_dir=sys.argv[1], **at), "rb").read()
    print(json.dumps([item.path, item.lfs and item.lfs.sha256, hashlib.sha256(data).hexdigest()]))
"""
    env = environment(server, tmp_path, HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-c", program, str(tmp_path / "theirs")]
    theirs = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    files = {path: (listed, actual) for path, listed, actual in map(json.loads, theirs.splitlines())}
    assert set(files) == set(FILES)
    for path, (listed, actual) in files.items():
        assert actual == hashlib.sha256(FILES[path]).hexdigest()
        assert listed == (actual if path.endswith(".parquet") else None)


def test_stage_downloads_and_each_byte_is_on_disk_once(server: HubServer, tmp_path: Path) -> None:
    """Catches: files out of order or renumbered, a second copy in a cache, a token sent to another host, a manifest
    that does not hold, a listing of which only the first page is read."""
    server.page = 1
    directory = prepare_stage(source("sample/*.parquet", "other/*.jsonl"), tmp_path / "store")
    done = run(directory, environment(server, tmp_path, HF_TOKEN="hf_right"))
    assert done.returncode == 0, done.stderr
    manifest = read_model(directory / "manifest.json", Manifest)
    assert isinstance(manifest.facts, DownloadFacts)
    assert manifest.facts.files == ("data/00000-a.parquet", "data/00001-b.parquet", "data/00002-d.jsonl")
    assert manifest.facts.origin == f"{REPO}@{REVISION}"
    assert manifest.facts.text_column == "text"
    assert manifest.problems(directory, deep=True) == []
    wanted = [FILES["sample/a.parquet"], FILES["sample/b.parquet"], FILES["other/d.jsonl"]]
    assert [(directory / name).read_bytes() for name in manifest.facts.files] == wanted
    assert manifest.facts.total_bytes == sum(map(len, wanted))
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= 1_000]
    assert sorted(path.name for path in copies if "data" in path.parts) == [
        "00000-a.parquet",
        "00001-b.parquet",
        "00002-d.jsonl",
    ]
    assert sum(path.stat().st_size for path in copies if "data" not in path.parts) < 10_000
    assert {seen.authorization for seen in server.requests(REPO, host="hub")} == {"Bearer hf_right"}
    assert {seen.authorization for seen in server.requests(REPO, host="storage")} == {None}
    lines = list(read_metrics(directory / "metrics.jsonl"))
    assert lines[-1]["done"] == lines[-1]["total"] == manifest.facts.total_bytes
    assert lines[-1]["unit"] == "bytes" and lines[-1]["step"] == 3
    requests = len(server.seen)
    again = run(directory, environment(server, tmp_path))
    assert again.returncode == 0 and len(server.seen) == requests


def test_download_workers_download_in_parallel(server: HubServer, tmp_path: Path) -> None:
    """Catches: download_workers without effect."""
    server.chunk, server.seconds_per_chunk = 1_000, 0.2  # the smallest file takes 20 s, unless three come at once
    over = threading.Event()

    def hurry() -> None:
        while server.most_in_flight < 3 and not over.wait(0.01):
            pass
        server.seconds_per_chunk = 0.0

    watching = threading.Thread(target=hurry)
    watching.start()
    try:
        get(source("sample/**"), tmp_path, workers=4)
    finally:
        over.set()
        watching.join()
    assert server.most_in_flight >= 3
    server.most_in_flight = 0
    server.chunk, server.seconds_per_chunk = 20_000, 0.02
    get(source("sample/**"), tmp_path / "one", workers=1)
    assert server.most_in_flight == 1


def test_shards_default_to_validation_first(server: HubServer, tmp_path: Path) -> None:
    """Catches: training shards before the validation shard, or stray files among them."""
    names = ["x_train_000002.bin", "x_val_000000.bin", "x_train_000001.bin", "README.md"]
    server.datasets["o/shards"] = Dataset({name: name.encode() * 50 for name in names})
    wanted = HubShards(repo="o/shards", revision=REVISION)
    expected = [name.encode() * 50 for name in (names[1], names[2], names[0])]
    assert get(wanted, tmp_path) == expected


# ---------------------------------------------------------------------------------------------------------- it insists


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", 503),
        Fault("status", 500),
        Fault("cut", after=70_000),
        Fault("cut", after=0),
        Fault("stall", after=70_000),
        Fault("short", after=70_000),
        Fault("wrong"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status if fault.kind == 'status' else fault.after}",
)
def test_a_transient_fault_is_retried(server: HubServer, tmp_path: Path, fault: Fault) -> None:
    """Catches: giving up at, or keeping the damage of, each way in which a download goes wrong on a bad day."""
    server.faults["sample/a.parquet"] = [fault, fault] if fault.kind != "wrong" else [fault]
    assert get(source(), tmp_path) == [FILES["sample/a.parquet"], FILES["sample/b.parquet"]]
    requests = server.requests("a.parquet", host="storage")
    if fault.after:  # the second begins where the first ended, the third where the second did
        assert [seen.start for seen in requests] == [0, 70_000, 140_000]
    elif fault.kind == "wrong":
        assert [seen.start for seen in requests] == [0, 0]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "headers", [(("Retry-After", "1"),), (("RateLimit", '"resolvers";r=0;t=1'),)], ids=["Retry-After", "RateLimit"]
)
def test_waits_as_long_as_429_asks(server: HubServer, tmp_path: Path, headers: tuple[tuple[str, str], ...]) -> None:
    """Catches: hammering a Hub that asked for a pause, which makes the pause longer."""
    server.faults["sample/a.parquet"] = [Fault("status", 429, headers)]
    get(source(), tmp_path)
    first, second = server.requests("a.parquet", host="storage")
    assert second.time - first.time >= 1.0


class Waits(threading.Event):
    """Notes how long it was to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return False


def test_an_answer_that_asks_for_no_pause_gets_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: Retry-After: 0 in place of the backoff, so that all tries are used up within three seconds."""
    request = httpx.Request("GET", "https://hub/x")
    for seconds, least in (("0", 0.75 * 77), ("40", 11 * 40)):
        response = httpx.Response(503, headers={"Retry-After": seconds}, request=request)
        waits = Waits()
        retries = Retrier("get x", RetryPolicy(max_tries=12, max_backoff=10.0), waits)
        with pytest.raises(UserError, match="12 tries in a row"):
            while True:
                retries.failed(HfHubHTTPError("503", response=response), None)
        assert len(waits.seconds) == 11 and sum(waits.seconds) >= least


def test_a_server_without_ranges_is_started_over(server: HubServer, tmp_path: Path) -> None:
    """Catches: appending a whole file to its own beginning."""
    server.faults["sample/a.parquet"] = [Fault("cut", after=50_000), Fault("no-ranges")]
    assert get(source(), tmp_path)[0] == FILES["sample/a.parquet"]


def test_listing_is_retried_too(server: HubServer, tmp_path: Path) -> None:
    """Catches: a stalled or refused listing that hangs or ends the stage (huggingface_hub's has no time-out)."""
    server.faults["tree"] = [Fault("status", 503), Fault("stall")]
    assert len(get(source(), tmp_path)) == 2
    assert len(server.requests("/tree/")) == 3


def test_wrong_bytes_again_and_again_name_both_hashes(server: HubServer, tmp_path: Path) -> None:
    """Catches: accepting a file that is not the one asked for, trying for ever, and losing the files that are right."""
    server.always["sample/b.parquet"] = Fault("wrong")
    with pytest.raises(UserError) as caught:
        get(source(), tmp_path)
    right = FILES["sample/b.parquet"]
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    for data in (right, wrong):
        assert hashlib.sha256(data).hexdigest() in str(caught.value)
    assert len(server.requests("b.parquet", host="storage")) == 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["00000-a.parquet"]


def test_wrong_bytes_of_a_small_file_are_seen_by_its_git_hash(server: HubServer, tmp_path: Path) -> None:
    """Catches: files outside large-file storage, such as small jsonl, going unverified."""
    server.faults["other/d.jsonl"] = [Fault("wrong")]
    assert get(source("other/*"), tmp_path) == [FILES["other/d.jsonl"]]
    assert len(server.requests("d.jsonl", host="hub")) == 4  # resolved and redirected, twice


def test_gives_up_after_bounded_tries_and_keeps_what_came(server: HubServer, tmp_path: Path) -> None:
    """Catches: trying for ever; the count restarting without new bytes; the part thrown away."""
    server.faults["sample/a.parquet"] = [Fault("cut", after=70_000)]
    server.always["sample/a.parquet"] = Fault("status", 503)
    with pytest.raises(UserError, match=r"could not download sample/a\.parquet .*4 tries in a row.*503"):
        get(source("sample/a.parquet"), tmp_path)
    assert len(server.requests("a.parquet", host="storage")) == 1 + 3
    server.always.clear()
    assert get(source("sample/a.parquet"), tmp_path) == [FILES["sample/a.parquet"]]
    assert server.requests("a.parquet", host="storage")[-1].start == 70_000


# ----------------------------------------------------------------------------------------------------- it says what is


def test_a_missing_repository_revision_and_match_are_told_apart(server: HubServer, tmp_path: Path) -> None:
    """Catches: one "404" for a wrong repository, revision and pattern alike."""
    with pytest.raises(UserError, match=r"data set nobody/nothing .*HF_TOKEN"):
        get(source(repo="nobody/nothing"), tmp_path / "a")
    with pytest.raises(UserError, match=f"no revision {'f' * 40}"):
        get(source(revision="f" * 40), tmp_path / "b")
    with pytest.raises(UserError, match=r"nothing matches 'sample/\*\.bin' .* 'sample' has 3 files, such as"):
        get(source("sample/*.bin"), tmp_path / "c")
    with pytest.raises(UserError, match=r"nothing matches 'nowhere/\*' .* 'nowhere' has 0 files"):
        get(source("nowhere/*"), tmp_path / "d")
    with pytest.raises(UserError, match=r"README\.md .* \.parquet"):
        get(source("*"), tmp_path / "e")
    with pytest.raises(UserError, match=r"'a\*\*b'"):
        get(source("a**b"), tmp_path / "f")


def test_private_and_gated_repositories_need_hf_token(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: HF_TOKEN not honoured; a refusal that does not mention it."""
    server.datasets["o/private"] = Dataset(dict(FILES), private=True)
    server.datasets["o/gated"] = Dataset(dict(FILES), gated=True)
    with pytest.raises(UserError, match=r"o/private .*HF_TOKEN"):
        get(source(repo="o/private"), tmp_path / "a")
    with pytest.raises(UserError, match=r"o/gated .*HF_TOKEN"):
        get(source(repo="o/gated"), tmp_path / "b")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert len(get(source(repo="o/private"), tmp_path / "a")) == 2
    assert len(get(source(repo="o/gated"), tmp_path / "b")) == 2


def test_without_a_network_the_error_is_one_line(server: HubServer, tmp_path: Path) -> None:
    """Catches: a traceback, or minutes of waiting, where there is no network."""
    directory = prepare_stage(source(), tmp_path / "store")
    offline = run(directory, environment(server, tmp_path, HF_HUB_OFFLINE="1"))
    assert offline.returncode == 2
    assert offline.stderr.startswith("error: HF_HUB_OFFLINE is set") and offline.stderr.count("\n") == 1
    began = time.monotonic()
    unreachable = run(directory, environment(server, tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))
    assert unreachable.returncode == 2
    assert unreachable.stderr.startswith(f"error: could not list {REPO}, 5 tries in a row: ConnectError")
    assert time.monotonic() - began < 30


def test_disk_need_is_stated_and_checked_first(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: finding out after an hour that 10^15 bytes do not fit."""
    get(source(), tmp_path / "fits")
    assert f"2 files, 0.001 GB, of {REPO}@{REVISION[:12]}; 0.001 GB to go" in capsys.readouterr().out
    server.datasets[REPO].sizes["sample/b.parquet"] = 10**15
    with pytest.raises(UserError, match=r"needs 1,000,000\.0 GB more, [\d,.]+ GB are free at "):
        get(source(), tmp_path / "huge")
    assert not list((tmp_path / "huge" / "data").iterdir())


def test_a_file_shorter_than_listed_is_an_error(server: HubServer, tmp_path: Path) -> None:
    """Catches: asking for ever for bytes that the server does not have."""
    server.datasets[REPO].sizes["sample/a.parquet"] = 200_001
    with pytest.raises(UserError, match=r"could not download sample/a\.parquet"):
        get(source("sample/a.parquet"), tmp_path)


# ---------------------------------------------------------------------------------------------------- it resumes


@pytest.mark.parametrize("seed", range(3))
def test_killed_midway_it_goes_on_at_the_byte(server: HubServer, tmp_path: Path, seed: int) -> None:
    """Catches: finished files fetched again after kill -9, a part restarted from byte 0 or taken for a whole file."""
    print("seed", seed)
    rng = random.Random(seed)
    files = {f"f{i}.jsonl.gz": content(10 + i, rng.randrange(300_000, 600_000)) for i in range(5)}
    server.datasets["o/many"] = Dataset(files)
    server.chunk, server.seconds_per_chunk = 20_000, 0.01
    directory = prepare_stage(source("*.gz", repo="o/many"), tmp_path / "store")
    env = environment(server, tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "gpt2.download", str(directory)], env=env)
    target = rng.uniform(0.55, 0.85) * sum(map(len, files.values()))
    while sum(seen.sent for seen in server.seen) < target:
        assert process.poll() is None
        time.sleep(0.005)
    # What was sent may still be under way to the disk. Meanwhile the rest, a seventh at least, comes slowly.
    server.seconds_per_chunk = 0.5
    while not (list((directory / "data").glob("0*")) and list((directory / "data").glob(".*.part"))):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in (directory / "data").glob("0*")}
    parts = {path.name[1:].removesuffix(".part"): path.stat().st_size for path in (directory / "data").glob(".*.part")}
    assert finished and parts and not (directory / "manifest.json").exists()

    server.seen.clear()
    server.seconds_per_chunk = 0
    done = run(directory, env)
    assert done.returncode == 0, done.stderr
    manifest = read_model(directory / "manifest.json", Manifest)
    assert manifest.problems(directory, deep=True) == []
    assert [(directory / entry.path).read_bytes() for entry in manifest.files] == list(files.values())
    assert not server.requests("/tree/")
    requests_of = {f"{i:05d}-{name}": server.requests(name, host="storage") for i, name in enumerate(files)}
    for (name, requests), data in zip(requests_of.items(), files.values(), strict=True):
        have = len(data) if name in finished else parts.get(name, 0)  # a part may be whole, and only lack its name
        assert [seen.start for seen in requests] == ([have] if have < len(data) else [])
    for name, mtime_ns in finished.items():
        assert (directory / "data" / name).stat().st_mtime_ns == mtime_ns
    assert not list((directory / "data").glob(".*"))


def test_killed_between_last_file_and_manifest_needs_no_network(server: HubServer, tmp_path: Path) -> None:
    """Catches: a complete download that cannot be finished because the Hub is asked for the listing again."""
    directory = prepare_stage(source(), tmp_path / "store")
    env = environment(server, tmp_path)
    assert run(directory, env).returncode == 0
    (directory / "manifest.json").unlink()
    assert run(directory, env | {"HF_ENDPOINT": "http://127.0.0.1:9"}).returncode == 0


def test_a_damaged_part_is_found_out(server: HubServer, tmp_path: Path) -> None:
    """Catches: building on a part that a power cut left with zeros in it."""
    part = tmp_path / "data" / ".00000-a.parquet.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(50_000))
    assert get(source("sample/a.parquet"), tmp_path) == [FILES["sample/a.parquet"]]
    part.write_bytes(bytes(500_000))  # longer than the file
    (tmp_path / "data" / "00000-a.parquet").unlink()
    assert get(source("sample/a.parquet"), tmp_path) == [FILES["sample/a.parquet"]]


FULL_DISK = """
mount -t tmpfs -o size=2m tmpfs "$1/data" || exit 77
"$2" -m gpt2.download "$1" & stage=$!
while [ ! -s "$1"/data/.00000*.part ]; do sleep 0.02; done
cat /dev/zero > "$1/data/filler" 2>/dev/null
wait $stage; echo "status $?"
rm "$1/data/filler"
"$2" -m gpt2.download "$1"; echo "status $?"
sha256sum "$1"/data/0*
"""


def test_a_disk_that_fills_up_keeps_the_part(server: HubServer, tmp_path: Path) -> None:
    """Catches: a traceback when another program takes the space that was there at the start, or the part lost."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces, to mount a small disk")
    data = content(5, 1_000_000)
    server.datasets["o/one"] = Dataset({"f.bin": data})
    server.chunk, server.seconds_per_chunk = 10_000, 0.01
    directory = prepare_stage(HubShards(repo="o/one", revision=REVISION, files=("f.bin",)), tmp_path / "store")
    (directory / "data").mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(directory), sys.executable]
    done = subprocess.run(command, env=environment(server, tmp_path), capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("may not mount a small disk here")
    assert [line for line in done.stdout.splitlines() if "status" in line] == ["status 2", "status 0"], done
    assert done.stderr.startswith("error: no space left for ") and done.stderr.count("\n") == 1
    assert hashlib.sha256(data).hexdigest() in done.stdout
    first, second = server.requests("f.bin", host="storage")
    assert first.start == 0 and second.start > 0


def test_progress_is_printed_with_rate_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: an hour of silence; a rate that counts what an earlier session downloaded."""
    with DownloadProgress(MetricsWriter(tmp_path / "metrics.jsonl")) as report:
        report.PRINT_SECONDS = report.METRICS_SECONDS = 0.0
        report(500_000_000, 3_000_000_000, 1)
        time.sleep(0.5)
        report(1_000_000_000, 3_000_000_000, 2)
    line = capsys.readouterr().out.splitlines()[-1]
    match = re.fullmatch(r"download: 2 files complete, 1\.000 of 3\.000 GB, ([\d,.]+) MB/s, (\d+) s left", line)
    assert match, line
    assert 400 < float(match[1].replace(",", "")) <= 1_000 and 2 <= int(match[2]) <= 5
    last = list(read_metrics(tmp_path / "metrics.jsonl"))[-1]
    assert (last["step"], last["done"], last["total"], last["unit"]) == (2, 1_000_000_000, 3_000_000_000, "bytes")


# ---------------------------------------------------------------------------------------------------------- local files


def test_local_files_are_linked_and_verified(tmp_path: Path) -> None:
    """Catches: a second copy of the corpus; a corpus that changed after planning trained on under the old address."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("b.txt", "a.jsonl"):
        (folder / name).write_text(f"text of {name}\n")
    directory = prepare_stage(LocalFiles(paths=(str(folder / "b.txt"), str(folder / "*.jsonl"))), tmp_path / "store")
    done = run(directory, dict(os.environ))
    assert done.returncode == 0, done.stderr
    manifest = read_model(directory / "manifest.json", Manifest)
    assert [entry.path for entry in manifest.files] == ["data/00000-b.txt", "data/00001-a.jsonl"]
    assert all((directory / entry.path).is_symlink() for entry in manifest.files)
    assert manifest.problems(directory, deep=True) == []

    (directory / "manifest.json").unlink()
    (folder / "b.txt").write_text("another text\n")
    changed = run(directory, dict(os.environ))
    assert changed.returncode == 2 and "b.txt changed since the run was planned: sha256 " in changed.stderr
    (folder / "b.txt").unlink()
    missing = run(directory, dict(os.environ))
    assert missing.returncode == 2 and f"{folder / 'b.txt'} no longer exists" in missing.stderr


def test_fetch_serves_other_stages(server: HubServer, tmp_path: Path) -> None:
    """Catches: fetch working for the download stage alone; the benchmark stage uses it for HellaSwag."""
    identity, hints = identify(source("other/*.jsonl"), tmp_path)
    directory = tmp_path / "benchmark" / "abc"
    calls: list[tuple[int, int, int]] = []
    names = fetch(
        json.loads(json.dumps(identity)),
        json.loads(json.dumps(hints)),
        directory,
        workers=1,
        progress=lambda *call: calls.append(call),
    )
    assert names == ["data/00000-d.jsonl"] and (directory / names[0]).read_bytes() == FILES["other/d.jsonl"]
    size = len(FILES["other/d.jsonl"])
    assert calls[-1] == (size, size, 1)
