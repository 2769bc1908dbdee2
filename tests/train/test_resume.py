"""Whatever ends a run, the same command again brings it to the end that it would have had: bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_run import WHOLE_VOCABULARY, assert_same, faulty, lines, make_run, make_shards, result, run, start, steps

from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TrainFacts
from gpt2.stage.metrics import parse_line
from gpt2.train.run_log import RunLog
from tasks.stage import discard_damaged

CAUSES = ("SIGKILL", "SIGTERM", "exception", "disk full")
PHASES = ("step", "validation", "checkpoint")
SIZES = (1, 2)


class Matrix:
    """All runs of the matrix, a few at a time, since most of a run is Python starting."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.shards = make_shards(store)
        self.pool = ThreadPoolExecutor(2)
        self.whole = {size: self.pool.submit(self._uninterrupted, size) for size in SIZES}
        self.cases: dict[tuple[str, str, int], Future[dict[str, Any]]] = {
            (cause, phase, size): self.pool.submit(self._interrupted, cause, phase, size)
            for size in SIZES
            for cause in CAUSES
            for phase in PHASES
        }

    def _directory(self, name: str) -> Path:
        shutil.copytree(self.store / "tokenize", self.store / name / "tokenize")
        return make_run(self.store / name, self.shards)

    def _uninterrupted(self, size: int) -> dict[str, Any]:
        directory = self._directory(f"whole-{size}")
        run(directory, size)
        return result(directory)

    def _interrupted(self, cause: str, phase: str, size: int) -> dict[str, Any]:
        directory = self._directory(f"{cause}-{phase}-{size}".replace(" ", "-"))
        rank = size - 1 if phase != "checkpoint" and cause != "disk full" else 0
        output = run(directory, expect=None, words=faulty(directory, size, cause, phase, rank))
        finished, saved = (directory / "manifest.json").exists(), steps(directory)
        again = run(directory, size)
        return {"output": output, "finished": finished, "saved": saved, "again": again, **result(directory)}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("cause", CAUSES)
def test_an_interrupted_run_ends_like_one_that_was_not(matrix: Matrix, cause: str, phase: str, size: int) -> None:
    """Bugs: a step repeated or left out, moments or progress not restored, metrics doubled, half a checkpoint read, a
    disk that is full taking the last good checkpoint with it."""
    case = matrix.cases[cause, phase, size].result()
    assert not case["finished"], case["output"]
    assert_same(case, matrix.whole[size].result())
    if cause == "SIGTERM":  # nothing is lost: saved where it was, not where the last checkpoint happened to be
        assert case["saved"][-1] >= {"step": 6, "validation": 8, "checkpoint": 8}[phase], case["output"]
        assert f"resuming after step {case['saved'][-1]}" in case["again"]
        assert "everything is saved" in case["output"]
    else:
        assert case["saved"] in ([4], [])  # the thread may still have been writing it
    if cause == "disk full":
        assert "error: no space left" in case["output"] and "Traceback" not in case["output"].split("torch/dist")[0]
    if cause == "exception":
        first = case["output"].index("Traceback")
        assert "a fault of this test" in case["output"][first:].split("Traceback")[1]


def test_a_line_torn_by_a_full_disk_goes_at_the_next_start(tmp_path: Path) -> None:
    """Bug: the next line is written onto the torn one, and from then on the file cannot be read."""
    log = RunLog(tmp_path, 12, active=True)
    log.truncate(0, evaluated=False)
    log.sample(0, "", "whole")
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"time": 1, "step": 4, "te')
    for _ in range(2):
        log.truncate(4, evaluated=False)
        log.sample(4, "", "again")
    assert [line["text"] for line in lines(tmp_path / "samples.jsonl")] == ["whole", "again"]


@pytest.mark.slow
def test_a_signal_does_not_wait_for_the_end_of_a_long_step(tmp_path: Path) -> None:
    """Bug: a step of a large model takes longer than a machine that is taken away leaves."""
    directory = make_run(tmp_path, runtime={"micro_batch_size": 1}, total_batch_size=16 * 1500, max_steps=3)
    process = start(directory)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 143, rest
    assert steps(directory) == [1], rest


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_is_told_by_the_status(tmp_path: Path, number: int, status: int) -> None:
    """Bug: a pre-empted machine loses the steps since its last checkpoint, or looks as if it had finished or failed.
    Samples, which depend on a seed of their own, are written in this one."""
    store, shards = tmp_path, make_shards(tmp_path, eot=True)
    whole = make_run(store, shards, **WHOLE_VOCABULARY)
    shutil.copytree(store, tmp_path.parent / f"{tmp_path.name}-2", dirs_exist_ok=True)
    stopped = tmp_path.parent / f"{tmp_path.name}-2" / whole.relative_to(store)
    run(whole)

    process = start(stopped)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    began = time.monotonic()
    rest = process.stdout.read()
    assert process.wait(60) == status, rest
    assert time.monotonic() - began < 10
    (saved,) = steps(stopped)
    assert saved in (2, 3, 4), rest
    run(stopped)
    assert_same(result(stopped), result(whole))
    assert len(result(whole)["samples"]) == 4


@pytest.mark.slow
def test_a_finished_stage_does_nothing_and_a_missing_manifest_is_made_again(tmp_path: Path) -> None:
    """Bug: a run killed between its last checkpoint and its manifest trains, validates or writes anything twice."""
    directory = make_run(tmp_path)
    run(directory)
    before = result(directory)
    assert run(directory) == ""
    (directory / "manifest.json").unlink()
    output = run(directory)
    assert "resuming after step 12" in output and "loss " in output and "step 12/12" not in output
    assert_same(result(directory), before)


def change_state(directory: Path, **changes: Any) -> None:
    """Change the final checkpoint's state.json; None deletes a field. And have the stage finish once more."""
    path = directory / "checkpoints" / "step_00000012" / "state.json"
    state = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    (directory / "manifest.json").unlink()


@pytest.mark.slow
def test_gpus_and_mfu_are_of_all_sessions_not_of_the_last(tmp_path: Path) -> None:
    """Bug: 19,000 steps on 8 GPUs and 560 on one give 8 times the MFU and an eighth of the GPU-hours."""
    directory = make_run(tmp_path)
    run(directory, expect=None, words=faulty(directory, 2, "SIGTERM", "step", 0))
    run(directory)
    facts = StageDir(directory).facts(TrainFacts)
    assert [(session.device, session.processes) for session in facts.sessions] == [("cpu", 2), ("cpu", 1)]
    assert sum(session.seconds for session in facts.sessions) == facts.total_seconds > facts.train_seconds
    assert (facts.device, facts.world_size, facts.gpu_seconds) == ("2 x cpu, cpu", 1, 0)

    eight, one = (
        {"device": "NVIDIA L4", "processes": count, "seconds": seconds} for count, seconds in ((8, 5e4), (1, 9e3))
    )
    change_state(directory, sessions=[eight, one], total_seconds=5.9e4, speeds=[9.0, 8.0, 1.0], mfus=[0.5, 0.4, 0.6])
    run(directory)
    facts = StageDir(directory).facts(TrainFacts)
    assert (facts.gpu_seconds, facts.mfu, facts.tokens_per_second) == (8 * 5e4 + 9e3, 0.5, 8.0)
    assert facts.device == "8 x NVIDIA L4, NVIDIA L4, cpu" and facts.total_seconds > 5.9e4


@pytest.mark.slow
def test_a_checkpoint_without_sessions_speeds_and_val_loss_finishes(tmp_path: Path) -> None:
    """Bug: a checkpoint written before these fields existed cannot be finished, or loses its hours."""
    directory = make_run(tmp_path)
    run(directory)
    before, records = StageDir(directory).facts(TrainFacts), result(directory)
    change_state(directory, sessions=None, speeds=None, mfus=None, val_loss=None, total_seconds=7200.0)
    run(directory)
    after = StageDir(directory).facts(TrainFacts)
    assert after.val_loss == before.val_loss and after.train_loss == before.train_loss
    assert after.tokens_per_second == pytest.approx(12 * 192 / after.train_seconds)
    assert [session.processes for session in after.sessions] == [1] and after.total_seconds > 7200
    assert sorted(result(directory)["metrics"], key=repr) == sorted(records["metrics"], key=repr)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["not JSON", "not UTF-8", "deleted"])
def test_a_damaged_metrics_file_costs_neither_the_training_nor_the_file(tmp_path: Path, damage: str) -> None:
    """Bug: one changed byte in metrics.jsonl of a finished training deletes the file, and no later start finishes."""
    directory = make_run(tmp_path)
    run(directory)
    facts, path = StageDir(directory).facts(TrainFacts), directory / "metrics.jsonl"
    written = path.read_bytes().split(b"\n")
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(
            b"\n".join([*written[:3], (b"\xff" if damage == "not UTF-8" else b"[") + written[3][1:], *written[4:]])
        )
    discard_damaged(directory)
    assert not (directory / "manifest.json").exists() and path.exists() == (damage != "deleted")
    output = run(directory)
    assert ("damaged lines" in output) == (damage != "deleted")
    again = StageDir(directory).facts(TrainFacts)
    changed = {"total_seconds", "sessions"}
    assert again.model_dump(exclude=changed) == facts.model_dump(exclude=changed)
    kept = lines_kept(path)
    assert kept == ([] if damage == "deleted" else [*written[:3], *written[4:-1]])
    run(directory)


def lines_kept(path: Path) -> list[bytes]:
    """The lines that can be read."""
    return [line for line in path.read_bytes().splitlines() if parse_line(line + b"\n")]
