"""A stage as a Prefect task: cache hits and misses, retries, progress."""

import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.artifacts import Artifact as PrefectArtifact

from gpt2.config.runtime import Runtime
from gpt2.errors import UserError
from gpt2.stage.manifest import MANIFEST, Manifest, OtherVersion, Request, read_model, write_model
from gpt2.stage.metrics import MetricsWriter, cut_after_step
from gpt2.stage.table import STAGES
from tasks import stage as stages
from tasks.launch import StageCrashed, StageFailed
from tasks.progress import Bar, LogLines, MetricsTail, Progress, Watch, format_duration, format_rate

pytestmark = pytest.mark.slow  # a Prefect server

DOWNLOAD = Request(stage="download", version=1, config={})
TOKENIZE = Request(stage="tokenize", version=1, config={}, inputs={"corpus": DOWNLOAD.address})


@flow
def two_stages(store: Path, runtime: dict[str, Any] | None = None) -> dict[str, str]:
    """Name of each task run's state: Completed or Cached."""
    settings = Runtime(store=store, **(runtime or {}))
    corpus = stages.download.run_state(DOWNLOAD, settings)
    shards = stages.tokenize.run_state(TOKENIZE, settings, corpus.result())
    shards.result()
    return {"download": corpus.name or "", "tokenize": shards.name or ""}


def sessions(store: Path, request: Request = TOKENIZE) -> int:
    return len((store / request.address / "sessions").read_text().splitlines())


@pytest.fixture
def pipeline(store: Path, prefect_server: None, fake_stages: Callable[..., None]) -> Path:
    assert set(two_stages(store).values()) == {"Completed"}
    return store


# ------------------------------------------------------------------------------------------------------------- cache


def test_a_second_run_hits_whatever_the_runtime(pipeline: Path) -> None:
    """Bug: another number of workers tokenizes again."""
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}
    assert two_stages(pipeline, {"tokenize_workers": 3, "verify": True}) == {"download": "Cached", "tokenize": "Cached"}
    assert sessions(pipeline) == 1


def test_a_copied_store_hits(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "elsewhere", copy_function=shutil.copy)  # without the time stamps
    shutil.rmtree(pipeline)
    assert two_stages(tmp_path / "elsewhere") == {"download": "Cached", "tokenize": "Cached"}


def test_a_deleted_directory_is_a_miss(pipeline: Path) -> None:
    shutil.rmtree(pipeline / TOKENIZE.address)
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Completed"}


def test_a_missing_file_is_a_miss_with_a_message(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: the manifest alone counts as a hit."""
    (pipeline / TOKENIZE.address / "shards" / "val.bin").unlink()
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Completed"}
    assert TOKENIZE.address in caplog.text and f"{pipeline / TOKENIZE.address}/shards/val.bin: missing" in caplog.text
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}


def test_a_changed_byte_is_a_miss(pipeline: Path) -> None:
    path = pipeline / TOKENIZE.address / "shards" / "val.bin"
    path.write_text("x" + path.read_text()[1:])
    assert two_stages(pipeline)["tokenize"] == "Completed"
    assert path.read_text() == "val" * 10


def test_an_input_with_other_bytes_under_its_address_is_a_miss(pipeline: Path) -> None:
    """Bug: a stage that ran again with another result leaves the stages after it unchanged."""
    from gpt2.stage.directory import StageDir

    directory = StageDir(pipeline / DOWNLOAD.address)
    manifest = directory.manifest
    assert manifest is not None
    (directory.path / manifest.files[0].path).write_text("another text")
    directory.finish([manifest.files[0].path], manifest.facts)
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Completed"}
    assert sessions(pipeline) == 1, "the earlier work is set aside, with its record of sessions"
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}


def test_verify_reads_files_with_unchanged_stamps(pipeline: Path) -> None:
    """A byte that the disk changes leaves size, times and inode."""
    path, manifest_path = pipeline / TOKENIZE.address / "shards" / "val.bin", pipeline / TOKENIZE.address / MANIFEST
    path.write_text("x" + path.read_text()[1:])
    stat = path.stat()
    stamps = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
    manifest = read_model(manifest_path, Manifest)
    files = [entry.model_copy(update=stamps if entry.path == "shards/val.bin" else {}) for entry in manifest.files]
    write_model(manifest_path, manifest.model_copy(update={"files": tuple(files)}))
    assert two_stages(pipeline)["tokenize"] == "Cached"
    assert two_stages(pipeline, {"verify": True})["tokenize"] == "Completed"


def test_a_torn_manifest_is_a_miss(pipeline: Path) -> None:
    (pipeline / TOKENIZE.address / MANIFEST).write_text('{"address": "tok')
    assert two_stages(pipeline)["tokenize"] == "Completed"


def test_a_manifest_of_another_version_stops_the_run_and_stays(pipeline: Path) -> None:
    path = pipeline / TOKENIZE.address / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_field": 1}))
    with pytest.raises(OtherVersion, match="new_field"):
        two_stages(pipeline)
    assert json.loads(path.read_text())["new_field"] == 1
    assert sessions(pipeline) == 1


def test_a_finished_stage_without_its_request_gets_it_back(pipeline: Path) -> None:
    """Bug: the stage after it reads the request, and fails in each run."""
    path = pipeline / DOWNLOAD.address / "request.json"
    path.unlink()
    shutil.rmtree(pipeline / TOKENIZE.address)
    assert two_stages(pipeline)["tokenize"] == "Completed"
    assert read_model(path, Request).address == DOWNLOAD.address
    assert sessions(pipeline, DOWNLOAD) == 1, "the stage itself did not run again"
    path.write_text(TOKENIZE.model_dump_json())
    two_stages(pipeline)
    assert read_model(path, Request).address == DOWNLOAD.address
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}


def manifest_of(directory: Path, path: str) -> None:
    entry = {"path": path, "size": 1, "sha256": "0" * 64, "mtime_ns": 0}
    facts = {"stage": "benchmark", "kind": "x", "examples": 1, "chance": 0.25, "origin": "x"}
    manifest = {"address": f"download/{directory.name}", "files": [entry], "facts": facts}
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "path", ["../../../theirs.txt", "data/../../../../theirs.txt", "{outside}", "linked/theirs.txt"]
)
def test_a_path_in_a_manifest_deletes_nothing_outside(tmp_path: Path, path: str) -> None:
    """Bug: a copied store names a file outside of the directory, whose hash differs, and the file is deleted."""
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("theirs")
    directory = stages.prepare(Request(stage="download", version=1, config={}), Runtime(store=tmp_path / "store"))
    (directory / "linked").symlink_to(tmp_path)
    manifest_of(directory, path.format(outside=theirs))
    with pytest.raises(UserError):
        stages.discard_damaged(directory)
    assert theirs.read_text() == "theirs" and (directory / MANIFEST).exists()


def test_damage_removes_the_link_not_what_it_points_to(tmp_path: Path) -> None:
    """Bug: a stale link in a download's directory deletes the user's file."""
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("changed since")
    request = Request(stage="download", version=1, config={})
    directory = stages.prepare(request, Runtime(store=tmp_path / "store"))
    (directory / "data").mkdir()
    (directory / "data" / "00000-theirs.txt").symlink_to(theirs)
    manifest_of(directory, "data/00000-theirs.txt")
    stages.discard_damaged(directory)
    assert not (directory / MANIFEST).exists() and not (directory / "data" / "00000-theirs.txt").is_symlink()
    assert theirs.read_text() == "changed since"


# ----------------------------------------------------------------------------------------------------------- failure


def test_a_user_error_is_not_retried(store: Path, prefect_server: None, fake_stages: Callable[..., None]) -> None:
    fake_stages(download="user error")
    with pytest.raises(StageFailed, match=rf"^download {DOWNLOAD.address[9:17]}: shard 7 holds 3 tokens") as caught:
        two_stages(store)
    assert not isinstance(caught.value, StageCrashed)
    assert sessions(store, DOWNLOAD) == 1


def test_a_crash_is_retried(
    store: Path, prefect_server: None, fake_stages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in (stages.download, stages.tokenize):
        monkeypatch.setattr(task._task, "retry_delay_seconds", 0)
    fake_stages(download="crash once", tokenize="crash once")
    assert set(two_stages(store).values()) == {"Completed"}
    assert sessions(store, DOWNLOAD) == sessions(store, TOKENIZE) == 2


def test_every_stage_retries_a_crash() -> None:
    """Bug: a new stage has no retries."""
    tasks = {name: task for name, task in vars(stages).items() if isinstance(task, stages.StageTask)}
    assert tasks.keys() == STAGES.keys() and all(task._task.retries for task in tasks.values())


class BrokenDisplay:
    def __init__(self, where: str) -> None:
        self.where, self.calls = where, 0

    def show(self, progress: Progress) -> None:
        self._call("show")

    def close(self, progress: Progress, finished: bool) -> None:
        self._call("close")

    def _call(self, where: str) -> None:
        self.calls += 1
        if where == self.where:
            raise KeyError("a bug in the bar")


@pytest.mark.parametrize("where", ["show", "close"])
def test_an_exception_while_showing_progress_does_not_end_the_stage(
    where: str, store: Path, prefect_server: None, fake_stages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a bug in the progress bar ends a training."""
    created: list[BrokenDisplay] = []

    def displays(*arguments: Any) -> list[BrokenDisplay]:
        created.append(BrokenDisplay(where))
        return created[-1:]

    monkeypatch.setattr(stages, "_displays", displays)
    monkeypatch.setattr(Watch, "update", lambda watch: watch._call(lambda display: display.show(watch._progress)))
    assert set(two_stages(store).values()) == {"Completed"}
    assert sessions(store, DOWNLOAD) == sessions(store, TOKENIZE) == 1
    assert where == "close" or [display.calls for display in created] == [1, 1]  # removed after the first exception


def test_a_metrics_file_that_cannot_be_read_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: an exception, or a warning every half second for days."""
    (tmp_path / "metrics.jsonl").mkdir()
    watch = Watch(tmp_path / "metrics.jsonl", [], logging.getLogger("x"))
    for _ in range(3):
        watch.update()
    watch.close(finished=True)
    assert len(caplog.messages) == 1 and "IsADirectoryError" in caplog.messages[0]


def test_a_damaged_line_is_skipped(tmp_path: Path) -> None:
    """Bug: one changed byte in metrics.jsonl ends the progress bar."""
    line = b'{"time": 1.0, "step": %d}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line % 1 + b"[" + line % 2 + b"\xff" + line % 3 + b"17\n{}\n" + line % 4)
    assert [found["step"] for found in MetricsTail(tmp_path / "metrics.jsonl").lines()] == [1, 4]


def test_a_stage_waits_for_the_process_that_holds_its_directory(
    store: Path, prefect_server: None, fake_stages: Callable[..., None]
) -> None:
    """Bug: two flows that share data tokenize it twice."""
    from gpt2.stage.directory import StageDir

    directory = stages.prepare(DOWNLOAD, Runtime(store=store))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with StageDir(directory).lock():
            held.set()
            release.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    threading.Timer(1.5, release.set).start()
    began = time.monotonic()
    assert two_stages(store)["download"] == "Completed"
    assert time.monotonic() - began > 1.4
    other.join()


# ---------------------------------------------------------------------------------------------------------- progress


def test_the_tail_starts_over_in_a_file_that_was_cut(tmp_path: Path) -> None:
    """Bug: after a resumed training replaced the file, reading starts in the middle of a line."""
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert list(tail.lines()) == []
    writer = MetricsWriter(path)
    for step in (1, 2, 3):
        writer.write(step)
    assert [line["step"] for line in tail.lines()] == [1, 2, 3]
    with open(path, "a") as file:
        file.write('{"time": 1, "st')
    assert list(tail.lines()) == []
    writer.close()
    cut_after_step(path, 1)
    writer = MetricsWriter(path)
    for step in (2, 3, 4, 5):
        writer.write(step)
    assert [line["step"] for line in tail.lines()] == [1, 2, 3, 4, 5]


def test_a_tail_of_a_long_file_begins_at_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1000):
        writer.write(step)
    steps = [line["step"] for line in MetricsTail(path, 500).lines()]
    assert steps == list(range(steps[0], 1000)) and 3 < len(steps) < 20


def test_progress_says_how_far_how_fast_how_long(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path)
    assert not progress.update()
    lines = [{"time": 100.0 + i, "step": i, "done": 10 * i, "total": 1000, "unit": "steps"} for i in range(3)]
    lines.append({"time": 103.0, "step": 2, "train/loss": 4.5, "val/loss": 4.6})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert progress.update() and not progress.update()
    assert progress.describe() == "20 of 1,000 steps (2 %), 10.0 steps/s, 1 min 38 s left, loss 4.500"


@pytest.mark.parametrize(("rate", "text"), [(1 / 44.8, "44.8 s/step"), (1.0, "1.0 steps/s"), (1204, "1,204 steps/s")])
def test_format_rate(rate: float, text: str) -> None:
    """Bug: a slow step reads "0.0 steps/s"."""
    assert format_rate(rate, "steps") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (7200, "2 h"), (18240, "5 h 4 min"), (183600, "2 d 3 h")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_progress_is_an_artifact_that_ends_at_100(pipeline: Path) -> None:
    """Bug: it stays at the last line written, below 100 %."""
    key = f"progress-tokenize-{TOKENIZE.address.partition('/')[2][:8]}"
    artifact: Any = PrefectArtifact.get(key)
    assert artifact is not None and artifact.data == 100.0
    assert "100 of 100 bytes" in artifact.description


def test_the_bar_shares_the_console_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two consoles overwrite each other's lines; Prefect's console lacks the styles of rich's bars."""
    from prefect.logging.handlers import PrefectConsoleHandler

    progress = Progress(tmp_path / "metrics.jsonl")
    progress.done, progress.total, progress.unit = 5, 10, "steps"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws bars on terminals only
    terminal = io.StringIO()
    handler = PrefectConsoleHandler(stream=terminal)
    monkeypatch.setattr(logging.getLogger("prefect"), "handlers", [handler])
    bar = Bar("train 0f3a")
    bar.show(progress)
    handler.console.print("a line")
    bar.show(progress)
    bar.close(progress, finished=True)
    shown = terminal.getvalue()
    assert "train 0f3a" in shown and "5 of 10 steps (50 %)" in shown
    before, _, after = shown.partition("a line")
    assert "\x1b[2K" in before[before.rindex("train 0f3a") :], "the bar makes way for the line"
    assert "5 of 10 steps" in after, "and stands below it again"


def test_log_lines_are_rate_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(tmp_path / "metrics.jsonl")
    progress.done, progress.total, progress.unit = 5, 10, "steps"
    lines = LogLines(logging.getLogger("x"))
    lines.show(progress)
    assert not caplog.messages
    lines._next = 0
    lines.show(progress)
    lines.show(progress)
    assert caplog.messages == ["5 of 10 steps (50 %)"]


def test_the_result_is_the_manifest(pipeline: Path) -> None:
    @flow
    def one() -> Manifest:
        return stages.download(DOWNLOAD, Runtime(store=pipeline))

    assert one() == read_model(pipeline / DOWNLOAD.address / MANIFEST, Manifest)
