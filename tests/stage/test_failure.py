"""failure.json: kind, message and rank reach the process that started a stage."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from gpt2.config.runtime import Runtime
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.plan import prepare
from gpt2.stage import directory, torchrun
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import BenchmarkFacts
from gpt2.stage.failure import Failure, read_failure, write_failure
from gpt2.stage.manifest import Request

FACTS = BenchmarkFacts(kind="x", examples=1, chance=0.25, origin="test")
CASES = [
    (UserError("3 tokens, header says 4"), 2, Failure(kind="user", message="3 tokens, header says 4")),
    (ValueError("a bug"), 1, Failure(kind="crash", message="ValueError: a bug")),
    (OSError(errno.EROFS, os.strerror(errno.EROFS), "/s/x"), 2, "/s/x"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "no space left"),
]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("error", "status", "expected"), CASES)
def test_a_failure_reaches_the_launcher_and_the_next_start_removes_it(
    tmp_path: Path, parallel: bool, error: Exception, status: int, expected: Failure | str
) -> None:
    path = prepare(Request(stage="benchmark", version=1, config={}), Runtime(store=tmp_path, gpus=0))

    def start(work: object) -> int | str | None:
        if parallel:
            return torchrun.main(lambda stage, world: work(stage), str(path))  # type: ignore[operator]
        try:
            directory.main(work, [str(path)])  # type: ignore[arg-type]
        except SystemExit as ended:
            return ended.code
        return 0

    def fail(stage: StageDir) -> None:
        raise error

    assert start(fail) == status
    failure = read_failure(path)
    assert failure is not None
    if isinstance(expected, Failure):
        assert failure == expected
    else:
        assert failure.kind == "user" and expected in failure.message
    assert start(lambda stage: stage.finish([], FACTS)) == 0
    assert read_failure(path) is None


def test_an_interruption_that_follows_another_rank_s_failure_does_not_replace_it(tmp_path: Path) -> None:
    """torchrun sends SIGTERM to rank 0 after rank 1 failed."""
    path = prepare(Request(stage="train", version=1, config={}), Runtime(store=tmp_path, gpus=0))
    first = Failure(kind="crash", message="ValueError: a bug", rank=1)

    def interrupted(stage: StageDir, world: World) -> None:
        raise torchrun.Interrupted(signal.SIGTERM)

    def interrupted_after_failure(stage: StageDir, world: World) -> None:
        write_failure(path, first)
        interrupted(stage, world)

    assert torchrun.main(interrupted_after_failure, str(path)) == 143
    assert read_failure(path) == first
    assert torchrun.main(interrupted, str(path)) == 143
    failure = read_failure(path)
    assert failure is not None and failure.kind == "interrupted" and "SIGTERM" in failure.message


def test_no_directory_is_made_for_a_failure(tmp_path: Path) -> None:
    write_failure(tmp_path / "typo", Failure(kind="user", message="x"))
    assert not (tmp_path / "typo").exists() and read_failure(tmp_path / "typo") is None
