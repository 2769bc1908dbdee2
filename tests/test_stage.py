"""The frame of a stage: written whole or not at all, the manifest last, one worker at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for, written

from gpt2 import stage as stage_module
from gpt2.atomic import atomic_write, write_text
from gpt2.config import Runtime
from gpt2.errors import UserError
from gpt2.manifest import BenchmarkFacts, Manifest, Request, file_entry, read_model
from gpt2.metrics import MetricsWriter, cut_after_step, read_metrics
from gpt2.plan import prepare
from gpt2.stage import StageDir

FACTS = BenchmarkFacts(kind="x", examples=1, chance=0.25, origin="test")

STAGE_SCRIPT = """
import sys, time
from gpt2.errors import UserError
from gpt2.manifest import BenchmarkFacts
from gpt2.stage import main
def work(stage):
    what = stage.request.config["do"]
    with open(stage.path / "ran.txt", "a") as file:
        file.write("ran\\n")
    if what == "user error":
        raise UserError("shard 7 holds 3 tokens, its header says 4; delete it and run again")
    if what == "bug":
        raise ValueError("a bug")
    if what == "slow":
        for _ in range(600):
            if (stage.path / "go").exists():
                break
            time.sleep(0.05)
    if what == "killed":
        time.sleep(60)
    stage.finish(["ran.txt"], BenchmarkFacts(kind="x", examples=1, chance=0.25, origin="test"))
main(work)
"""


def directory(tmp_path: Path, what: str = "nothing") -> Path:
    return prepare(Request(stage="benchmark", version=1, config={"do": what}), Runtime(store=tmp_path))


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGE_SCRIPT, str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_finished_stage_does_no_work_again(tmp_path: Path) -> None:
    path = directory(tmp_path)
    for _ in range(2):
        process = start(path)
        assert process.wait() == 0
    assert (path / "ran.txt").read_text() == "ran\n"
    manifest = read_model(path / "manifest.json", Manifest)
    assert manifest.problems(path) == []
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["ended"] >= provenance["started"]


def test_a_user_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    process = start(directory(tmp_path, "user error"))
    _, err = process.communicate()
    assert process.returncode == 2
    assert err == "error: shard 7 holds 3 tokens, its header says 4; delete it and run again\n"


def test_a_bug_shows_its_traceback_and_leaves_no_manifest(tmp_path: Path) -> None:
    path = directory(tmp_path, "bug")
    process = start(path)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "ValueError: a bug" in err
    assert not (path / "manifest.json").exists()


def test_two_processes_one_works_the_other_waits(tmp_path: Path) -> None:
    path = directory(tmp_path, "slow")
    first = start(path)
    wait_for(lambda: written(path / "ran.txt") or first.poll() is not None)
    assert first.poll() is None
    second = start(path)
    assert second.stdout is not None
    said = second.stdout.readline()  # the first works on until it is told that the second waits
    (path / "go").touch()
    outputs = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting" in said and "waiting" not in "".join(outputs)
    assert (path / "ran.txt").read_text() == "ran\n"


def test_a_killed_holder_lets_go_of_the_lock(tmp_path: Path) -> None:
    """A lock file that outlives its holder would block every later run."""
    path = directory(tmp_path, "killed")
    holder = start(path)
    wait_for(lambda: written(path / "ran.txt") or holder.poll() is not None)
    assert holder.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with StageDir(path).lock():
        pass


def test_input_must_be_finished(tmp_path: Path) -> None:
    source = directory(tmp_path)
    request = Request(
        stage="train", version=1, config={}, inputs={"shards": read_model(source / "request.json", Request).address}
    )
    stage = StageDir(prepare(request, Runtime(store=tmp_path)))
    with pytest.raises(UserError, match="is not finished"):
        stage.input("shards")
    StageDir(source).finish([], FACTS)
    assert stage.input("shards").facts(BenchmarkFacts) == FACTS


def test_problems_name_what_changed(tmp_path: Path) -> None:
    path = directory(tmp_path)
    for name in ("a", "b", "c", "d"):
        write_text(path / name, "same length " + name)
    manifest = StageDir(path).finish(["a", "b", "c", "d"], FACTS)
    assert manifest.problems(path) == []
    (path / "a").unlink()
    (path / "b").write_text("shorter")
    (path / "c").write_text("same length C")
    os.utime(path / "d")
    problems = manifest.problems(path)
    assert [problem.split(": ")[0].rsplit("/", 1)[1] for problem in problems] == ["a", "b", "c"]
    assert "missing" in problems[0]
    assert "7 bytes, the manifest says 13" in problems[1]
    assert "sha256" in problems[2]


def test_a_flipped_byte_with_its_old_time_is_seen_when_asked_to_look_deep(tmp_path: Path) -> None:
    path = directory(tmp_path)
    write_text(path / "a", "abc")
    manifest = StageDir(path).finish(["a"], FACTS)
    times = (path / "a").stat()
    (path / "a").write_text("abd")
    os.utime(path / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert manifest.problems(path) == []
    assert len(manifest.problems(path, deep=True)) == 1


def test_an_old_record_of_another_shape_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"address": 3}')
    with pytest.raises(UserError, match=r"not a valid Manifest.*delete it and run again"):
        read_model(tmp_path / "manifest.json", Manifest)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no space left for .*file: free some and run again"),
        atomic_write(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_metrics_survive_a_torn_line_and_a_cut(tmp_path: Path) -> None:
    """A resumed run that appends after a torn line would corrupt two lines; one that does not cut doubles steps."""
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(5):
        writer.write(step, done=step, total=5, unit="steps", **{"train/loss": 1.0 / (step + 1)})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 5, "trai')
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3, 4]
    MetricsWriter(path).write(5)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3, 4, 5]
    whole = path.read_text().splitlines()
    cut_after_step(path, 2)
    assert path.read_text().splitlines() == whole[:3], "what is kept is kept to the byte"


def test_without_a_checkout_the_image_says_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: provenance of stages that ran in the image named no commit, since .git is not copied into it."""
    monkeypatch.setenv("GPT2_COMMIT", "0" * 40 + "+")
    assert stage_module.git_commit() != "0" * 40 + "+", "a checkout knows better"
    monkeypatch.setattr(stage_module, "__file__", str(tmp_path / "stage.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert stage_module.git_commit() == "0" * 40 + "+"
    monkeypatch.setenv("GPT2_COMMIT", "")
    assert stage_module.git_commit() is None


def test_file_entry_measures(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    entry = file_entry(tmp_path, "x")
    assert (entry.size, entry.sha256[:8]) == (3, "ba7816bf")
