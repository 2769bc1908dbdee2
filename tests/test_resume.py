"""Whatever ends a run, the same command again brings it to the end that it would have had: bit for bit."""

from __future__ import annotations

import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_run import WHOLE_VOCABULARY, assert_same, faulty, lines, make_run, make_shards, result, run, start, steps

from gpt2.records import Records

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
    records = Records(tmp_path, 12, active=True)
    records.go_back_to(0, evaluated=False)
    records.sample(0, "", "whole")
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"time": 1, "step": 4, "te')
    for _ in range(2):
        records.go_back_to(4, evaluated=False)
        records.sample(4, "", "again")
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
