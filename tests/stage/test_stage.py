"""The frame of a stage: written whole or not at all, the manifest last, one worker at a time."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from waiting import wait_for, written

from gpt2 import version
from gpt2.atomic import atomic_write, write_text
from gpt2.config.runtime import Runtime
from gpt2.errors import UserError
from gpt2.plan import prepare
from gpt2.stage.directory import Provenance, StageDir, is_finished, main
from gpt2.stage.facts import BenchmarkFacts, DownloadFacts, PretrainedFacts, ShardEntry, TrainFacts
from gpt2.stage.file_hashes import Hashes, Stamp
from gpt2.stage.manifest import Damaged, FileEntry, Manifest, OtherVersion, Request, file_entry, read_model, write_model
from gpt2.stage.metrics import MetricsWriter, cut_after_step, read_metrics
from gpt2.tokenize.shard_store import ShardRecord

FACTS = BenchmarkFacts(kind="x", examples=1, chance=0.25, origin="test")

STAGE_SCRIPT = """
import sys, time
from gpt2.errors import UserError
from gpt2.stage.facts import BenchmarkFacts
from gpt2.stage.directory import main
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


def made(store: Path, stage: str, content: str, *, ended: float | None = None, **inputs: Path) -> Path:
    """A finished stage with one file, made in this process; a finished one that is current is left as it is."""
    addresses = {role: f"{path.parent.name}/{path.name}" for role, path in inputs.items()}
    path = prepare(Request(stage=stage, version=1, config={}, inputs=addresses), Runtime(store=store))

    def work(directory: StageDir) -> None:
        write_text(path / "partial", content)
        write_text(path / "result", content)
        directory.finish(["result"], FACTS)

    main(work, [str(path)])
    if ended is not None:
        provenance = read_model(path / "provenance.json", Provenance)
        write_model(path / "provenance.json", provenance.model_copy(update={"ended": ended}))
    return path


def test_weights_trained_again_under_their_address_are_measured_and_reported_again(tmp_path: Path) -> None:
    """Bug: an evaluation knew its training by the address alone, which other weights have too."""
    train = made(tmp_path, "train", "weights")
    evaluate = made(tmp_path, "evaluate", "3.30", model=train)
    report = made(tmp_path, "report", "loss 3.30", model=train, scores=evaluate)
    shutil.rmtree(train)
    assert is_finished(evaluate), "a deleted input says nothing: space may have been short"
    made(tmp_path, "train", "other weights")
    assert not is_finished(evaluate) and not is_finished(report)
    with pytest.raises(UserError, match="out of date"):
        StageDir(report).input("scores")
    made(tmp_path, "evaluate", "3.10", model=train)
    assert (evaluate / "result").read_text() == "3.10"
    assert (evaluate / "superseded" / "001" / "partial").read_text() == "3.30"
    assert not is_finished(report)
    made(tmp_path, "report", "loss 3.10", model=train, scores=evaluate)
    assert (report / "result").read_text() == "loss 3.10"
    assert is_finished(evaluate) and is_finished(report)


def test_an_input_made_again_with_the_same_bytes_costs_nothing(tmp_path: Path) -> None:
    """Shards deleted for space and tokenized again, or a store copied without its times, must not train again."""
    shards = made(tmp_path, "tokenize", "tokens")
    train = made(tmp_path, "train", "weights", shards=shards)
    before = (train / "manifest.json").read_bytes()
    shutil.rmtree(shards)
    made(tmp_path, "tokenize", "tokens")
    os.utime(shards / "result", ns=(0, 0))
    assert is_finished(train)
    made(tmp_path, "train", "never written", shards=shards)
    assert (train / "manifest.json").read_bytes() == before


def test_unfinished_work_from_other_inputs_is_not_resumed(tmp_path: Path) -> None:
    """Bug: an evaluation that was interrupted gave the figures of the earlier weights for the new ones."""
    train = made(tmp_path, "train", "weights")
    evaluate = made(tmp_path, "evaluate", "3.30", model=train)
    (evaluate / "manifest.json").unlink()
    assert StageDir(evaluate).begin() and (evaluate / "partial").exists(), "of the same weights: it goes on"
    shutil.rmtree(train)
    made(tmp_path, "train", "other weights")
    assert StageDir(evaluate).begin() and not (evaluate / "partial").exists()
    kept = {path.name for path in (evaluate / "superseded" / "001").iterdir()}
    assert kept == {"partial", "result", "provenance.json"}
    assert StageDir(evaluate).begin()
    assert not (evaluate / "superseded" / "002").exists()


def test_work_set_aside_half_way_before_a_kill_is_set_aside_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = made(tmp_path, "train", "weights")
    evaluate = made(tmp_path, "evaluate", "3.30", model=train)
    shutil.rmtree(train)
    made(tmp_path, "train", "other weights")
    moved: list[str] = []

    def rename(path: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(path.name)
        os.rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", rename)
        StageDir(evaluate).begin()
    assert moved == ["manifest.json"], "else what is left would count as finished"
    assert StageDir(evaluate).begin()
    assert {path.name for path in evaluate.iterdir()} == {
        "request.json", "runtime.json", "inputs.json", ".lock", "superseded"
    }  # fmt: skip


def without_digests(path: Path) -> None:
    """As a version wrote it that recorded none."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["inputs"], manifest["version"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "inputs.json").unlink()


def test_a_manifest_without_digests_keeps_its_work_unless_its_model_is_younger(tmp_path: Path) -> None:
    """Trained weights and shards must survive the upgrade; an evaluation of earlier weights must not."""
    shards = made(tmp_path, "tokenize", "tokens", ended=5.0)  # again, after the training
    train = made(tmp_path, "train", "weights", ended=3.0, shards=shards)
    evaluate = made(tmp_path, "evaluate", "3.30", ended=4.0, model=train, shards=shards)
    for path in (shards, train, evaluate):
        without_digests(path)
    assert is_finished(train) and is_finished(evaluate)
    provenance = read_model(train / "provenance.json", Provenance)
    write_model(train / "provenance.json", provenance.model_copy(update={"ended": 6.0}))
    assert is_finished(train)
    assert not is_finished(evaluate)
    made(tmp_path, "evaluate", "3.10", model=train, shards=shards)
    assert (evaluate / "result").read_text() == "3.10" and is_finished(evaluate)


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


def test_a_change_with_its_old_size_and_mtime_is_seen(tmp_path: Path) -> None:
    """Catches: a file replaced by cp -p or rsync -t used as if it were the recorded one."""
    path = directory(tmp_path)
    write_text(path / "a", "abc")
    manifest = StageDir(path).finish(["a"], FACTS)
    times = (path / "a").stat()
    (path / "a").write_text("abd")
    os.utime(path / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(manifest.problems(path)) == 1


def test_a_flipped_byte_that_left_no_trace_is_seen_when_asked_to_look_deep(tmp_path: Path) -> None:
    """A disk changes bytes, never ctime; here the record says that nothing was touched."""
    path = directory(tmp_path)
    write_text(path / "a", "abc")
    manifest = StageDir(path).finish(["a"], FACTS)
    (path / "a").write_text("abd")
    entry = manifest.files[0].model_copy(update=Stamp.of(path / "a")._asdict())
    manifest = manifest.model_copy(update={"files": (entry,)})
    assert manifest.problems(path) == []
    assert len(manifest.problems(path, deep=True)) == 1


@pytest.mark.parametrize(
    ("extra", "writer"),
    [({"version": "0.9.0 (commit 0123456789ab)"}, r"0\.9\.0 \(commit 0123456789ab\)"), ({}, "abcdef")],
)
def test_a_manifest_of_another_version_is_an_error_that_names_both(
    tmp_path: Path, extra: dict[str, str], writer: str
) -> None:
    """Bug: it was taken for a damaged one, deleted, and its stage done again, under a training that read it."""
    path = made(tmp_path, "tokenize", "tokens")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["version"]
    (path / "manifest.json").write_text(json.dumps({**manifest, **extra, "new_field": 1}))
    provenance = read_model(path / "provenance.json", Provenance)
    write_model(path / "provenance.json", provenance.model_copy(update={"commit": "abcdef"}))
    with pytest.raises(OtherVersion, match=f"new_field.*{writer}.*{re.escape(version.code_version())}"):
        is_finished(path)
    with pytest.raises(SystemExit) as ended:
        made(tmp_path, "tokenize", "never written")
    assert ended.value.code == 2
    assert json.loads((path / "manifest.json").read_text())["new_field"] == 1
    assert (path / "result").read_text() == "tokens"


def test_a_manifest_without_inode_and_ctime_is_judged_by_mtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the store of an earlier version refused, or read whole at each start."""
    path = directory(tmp_path)
    write_text(path / "a", "abc")
    finished = StageDir(path).finish(["a"], FACTS)
    text = finished.model_dump_json(exclude={"files": {"__all__": {"inode", "ctime_ns"}}})
    assert "inode" not in text
    monkeypatch.setattr("gpt2.stage.file_hashes.sha256_file", lambda path: pytest.fail(f"{path} was read"))
    assert Manifest.model_validate_json(text).problems(path) == []


def test_a_copied_store_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: every file of a copied store read again at each start, as its inodes are never the recorded ones."""
    monkeypatch.setattr(Hashes, "RACY_NS", -3_600_000_000_000)
    path = directory(tmp_path / "store")
    write_text(path / "a", "abc")
    manifest = StageDir(path).finish(["a"], FACTS)
    copy = shutil.copytree(tmp_path / "store", tmp_path / "copy") / path.relative_to(tmp_path / "store")
    assert manifest.problems(copy) == []
    monkeypatch.setattr("gpt2.stage.file_hashes.sha256_file", lambda path: pytest.fail(f"{path} was read again"))
    assert manifest.problems(copy) == []


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b"])
def test_no_path_in_a_record_leads_out_of_its_directory(path: str) -> None:
    training = {"steps": 1, "tokens": 1, "n_params": 1, "train_loss": 1.0, "val_loss": 1.0, "train_seconds": 1.0,
              "total_seconds": 1.0, "tokens_per_second": 1.0, "flops_per_token": 1.0, "mfu": None, "device": "cpu",
              "world_size": 1, "precision": "fp32"}  # fmt: skip
    for model, fields in (
        (FileEntry, {"path": path, "size": 1, "sha256": "0", "mtime_ns": 0}),
        (ShardEntry, {"path": path, "split": "val", "tokens": 1}),
        (ShardRecord, {"path": path, "tokens": 1, "documents": 1, "sha256": "0", "end": {}}),
        (PretrainedFacts, {"origin": "x", "checkpoint": path}),
        (TrainFacts, {**training, "checkpoint": path}),
        (DownloadFacts, {"kind": "x", "text_column": None, "files": [path], "total_bytes": 1, "origin": "x"}),
        (Request, {"stage": "train", "version": 1, "config": {}, "inputs": {"shards": path}}),
    ):
        with pytest.raises(ValidationError, match="not a path inside"):
            model.model_validate(fields)


def test_a_torn_record_is_not_taken_for_another_version(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"address": "tok')
    with pytest.raises(Damaged, match="delete it and run again"):
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
    assert version.git_commit() != "0" * 40 + "+", "a checkout knows better"
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert version.git_commit() == "0" * 40 + "+"
    monkeypatch.setenv("GPT2_COMMIT", "")
    assert version.git_commit() is None


def test_file_entry_measures(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    entry = file_entry(tmp_path, "x")
    assert (entry.size, entry.sha256[:8]) == (3, "ba7816bf")
