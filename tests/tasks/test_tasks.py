"""A stage as a Prefect task: what hits the cache, what misses it, what progress shows."""

import io
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from prefect import flow
from prefect.artifacts import Artifact as PrefectArtifact

from gpt2.config.runtime import Runtime
from gpt2.errors import UserError
from gpt2.stage.manifest import MANIFEST, Manifest, OtherVersion, Request, read_model
from gpt2.stage.metrics import MetricsWriter, cut_after_step
from gpt2.stage.table import STAGES
from tasks import stage as stages
from tasks.launch import StageCrashed, StageFailed
from tasks.progress import Bar, LogLines, Progress, Tail, Watch, duration, pace

pytestmark = pytest.mark.slow  # a Prefect server

DOWNLOAD = Request(stage="download", version=1, config={})
TOKENIZE = Request(stage="tokenize", version=1, config={}, inputs={"corpus": DOWNLOAD.address})


@flow
def two_stages(store: Path, runtime: dict[str, Any] | None = None) -> dict[str, str]:
    """The states' names by stage: Completed, or Cached."""
    how = Runtime(store=store, **(runtime or {}))
    states = {}
    inputs: list[Manifest] = []
    for request, task in ((DOWNLOAD, stages.download), (TOKENIZE, stages.tokenize)):
        state = task.bound(request, how)(request, how, tuple(inputs), return_state=True)
        inputs.append(state.result())
        states[request.stage] = state.name
    return states


def sessions(store: Path, request: Request = TOKENIZE) -> int:
    return len((store / request.address / "sessions").read_text().splitlines())


@pytest.fixture
def pipeline(store: Path, prefect_server: None, fake_stages: Callable[..., None]) -> Path:
    assert set(two_stages(store).values()) == {"Completed"}
    return store


# ------------------------------------------------------------------------------------------------------------- cache


def test_a_second_run_hits_whatever_the_runtime(pipeline: Path) -> None:
    """How a stage is run must not be part of its key, or a new number of workers would tokenize again."""
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}
    assert two_stages(pipeline, {"tokenize_workers": 3, "verify": True}) == {"download": "Cached", "tokenize": "Cached"}
    assert sessions(pipeline) == 1


def test_the_manifest_alone_is_the_record(pipeline: Path) -> None:
    """Prefect's own result files may be lost: with a second record, manifest and cache could disagree."""
    shutil.rmtree(pipeline / ".prefect")
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}


def test_a_full_disk_does_not_turn_a_hit_into_a_miss(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a finished run starts its stages again, because the copy of a manifest that Prefect reads is rewritten."""

    def full(path: Path, mode: str = "wb") -> NoReturn:
        raise UserError(f"no space left for {path}")

    monkeypatch.setattr("tasks.stage.atomic_write", full)
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}
    assert sessions(pipeline) == 1


def test_a_copied_store_hits(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "elsewhere", copy_function=shutil.copy)  # without the time stamps
    shutil.rmtree(pipeline)
    assert two_stages(tmp_path / "elsewhere") == {"download": "Cached", "tokenize": "Cached"}


def test_a_deleted_directory_is_made_again(pipeline: Path) -> None:
    shutil.rmtree(pipeline / TOKENIZE.address)
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Completed"}


def test_a_missing_file_is_made_again_with_a_message(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prefect knows nothing of the files behind a result and would take the hit."""
    (pipeline / TOKENIZE.address / "shards" / "val.bin").unlink()
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Completed"}
    assert f"{TOKENIZE.address} is made again: {pipeline / TOKENIZE.address}/shards/val.bin: missing" in caplog.text
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}


def test_a_changed_byte_is_seen(pipeline: Path) -> None:
    path = pipeline / TOKENIZE.address / "shards" / "val.bin"
    path.write_text("x" + path.read_text()[1:])
    assert two_stages(pipeline)["tokenize"] == "Completed"
    assert path.read_text() == "val" * 10


def test_an_input_with_other_bytes_under_its_address_is_a_miss(pipeline: Path) -> None:
    """Bug: a stage that was made again, and gave something else, left all that follows at what it was before."""
    from gpt2.stage.directory import StageDir

    directory = StageDir(pipeline / DOWNLOAD.address)
    manifest = directory.manifest
    assert manifest is not None
    (directory.path / manifest.files[0].path).write_text("another text")
    directory.finish([manifest.files[0].path], manifest.facts)
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Completed"}
    assert sessions(pipeline) == 1, "the earlier work is set aside, with its record of sessions"
    assert two_stages(pipeline) == {"download": "Cached", "tokenize": "Cached"}


def test_verify_sees_what_the_time_stamp_hides(pipeline: Path) -> None:
    path = pipeline / TOKENIZE.address / "shards" / "val.bin"
    stat = path.stat()
    path.write_text("x" + path.read_text()[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert two_stages(pipeline)["tokenize"] == "Cached"
    assert two_stages(pipeline, {"verify": True})["tokenize"] == "Completed"


def test_a_torn_manifest_is_no_manifest(pipeline: Path) -> None:
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
    """Bug: it was cached, and the stage after it failed for ever, for it reads the request."""
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
    """Bug: a store from elsewhere names any file, which does not agree with what is said of it, and was deleted."""
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("theirs")
    directory = stages.prepare(Request(stage="download", version=1, config={}), Runtime(store=tmp_path / "store"))
    (directory / "linked").symlink_to(tmp_path)
    manifest_of(directory, path.format(outside=theirs))
    with pytest.raises(UserError):
        stages.discard_damaged(directory)
    assert theirs.read_text() == "theirs" and (directory / MANIFEST).exists()


def test_damage_removes_the_link_not_what_it_points_to(tmp_path: Path) -> None:
    """Local files are linked into a download's directory: discarding a stale one must not touch the user's file."""
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


def test_a_users_error_is_not_tried_again(store: Path, prefect_server: None, fake_stages: Callable[..., None]) -> None:
    fake_stages(download="user error")
    with pytest.raises(StageFailed, match=rf"^download {DOWNLOAD.address[9:17]}: shard 7 holds 3 tokens") as caught:
        two_stages(store)
    assert not isinstance(caught.value, StageCrashed)
    assert sessions(store, DOWNLOAD) == 1


def test_a_crash_is_tried_again(
    store: Path, prefect_server: None, fake_stages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that fails once in the night, or a worker that runs out of memory, must not cost the night."""
    for task in (stages.download, stages.tokenize):
        monkeypatch.setattr(task._task, "retry_delay_seconds", 0)
    fake_stages(download="crash once", tokenize="crash once")
    assert set(two_stages(store).values()) == {"Completed"}
    assert sessions(store, DOWNLOAD) == sessions(store, TOKENIZE) == 2


def test_every_stage_tries_a_crash_again() -> None:
    """Bug: a stage that was added, or report, without a retry."""
    tasks = {name: task for name, task in vars(stages).items() if isinstance(task, stages.StageTask)}
    assert tasks.keys() == STAGES.keys() and all(task._task.retries for task in tasks.values())


class Broken:
    """A display that fails."""

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
    """Bug: a training of days ends for a bug in its progress bar, and is not retried."""
    made: list[Broken] = []

    def displays(*arguments: Any) -> list[Broken]:
        made.append(Broken(where))
        return made[-1:]

    monkeypatch.setattr(stages, "_displays", displays)
    monkeypatch.setattr(Watch, "look", lambda watch: watch._each(lambda display: display.show(watch._progress)))
    assert set(two_stages(store).values()) == {"Completed"}
    assert sessions(store, DOWNLOAD) == sessions(store, TOKENIZE) == 1
    assert where == "close" or [display.calls for display in made] == [1, 1]  # not asked again


def test_a_metrics_file_that_cannot_be_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: an exception, or a warning every half second for days."""
    (tmp_path / "metrics.jsonl").mkdir()
    watch = Watch(tmp_path / "metrics.jsonl", [], logging.getLogger("x"))
    for _ in range(3):
        watch.look()
    watch.close(finished=True)
    assert len(caplog.messages) == 1 and "IsADirectoryError" in caplog.messages[0]


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    """Bug: one changed byte in metrics.jsonl raises an exception in all that show it."""
    line = b'{"time": 1.0, "step": %d}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line % 1 + b"[" + line % 2 + b"\xff" + line % 3 + b"17\n{}\n" + line % 4)
    assert [found["step"] for found in Tail(tmp_path / "metrics.jsonl").lines()] == [1, 4]


def test_a_stage_that_another_process_works_on_is_waited_for(
    store: Path, prefect_server: None, fake_stages: Callable[..., None]
) -> None:
    """Two flows that share data must tokenize it once."""
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


def test_a_tail_reads_on_and_starts_over_when_the_file_was_cut(tmp_path: Path) -> None:
    """A resumed training replaces the file: going on at the old offset would begin in the middle of a line."""
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
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
    steps = [line["step"] for line in Tail(path, 500).lines()]
    assert steps == list(range(steps[0], 1000)) and 3 < len(steps) < 20


def test_progress_says_how_far_how_fast_how_long(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path)
    assert not progress.look()
    lines = [{"time": 100.0 + i, "step": i, "done": 10 * i, "total": 1000, "unit": "steps"} for i in range(3)]
    lines.append({"time": 103.0, "step": 2, "train/loss": 4.5, "val/loss": 4.6})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert progress.look() and not progress.look()
    assert progress.describe() == "20 of 1,000 steps (2 %), 10.0 steps/s, 1 min 38 s left, loss 4.500"


@pytest.mark.parametrize(("rate", "text"), [(1 / 44.8, "44.8 s/step"), (1.0, "1.0 steps/s"), (1204, "1,204 steps/s")])
def test_paces(rate: float, text: str) -> None:
    """Bug: "0.0 steps/s" while a large model takes its time."""
    assert pace(rate, "steps") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (7200, "2 h"), (18240, "5 h 4 min"), (183600, "2 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_is_an_artifact_that_ends_at_100(pipeline: Path) -> None:
    """A bar that stops at the last line written stays below 100 % for ever."""
    key = f"progress-tokenize-{TOKENIZE.address.partition('/')[2][:8]}"
    artifact: Any = PrefectArtifact.get(key)
    assert artifact is not None and artifact.data == 100.0
    assert "100 of 100 bytes" in artifact.description


def test_the_bar_shares_the_console_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two consoles on one terminal overwrite each other's lines; and Prefect's has no styles of rich's bars."""
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


def test_log_lines_come_now_and_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
