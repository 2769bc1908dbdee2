"""A command for people answers with one line, whatever the file system and the shell do to it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.reproduce import configure
from gpt2.errors import UserError
from gpt2.stage.torchrun import report_failure

ROOT = Path(__file__).parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("words", [["gpt2.plan", "124m"], ["gpt2.report.definitions"]])
def test_a_reader_that_leaves_causes_no_traceback(words: list[str]) -> None:
    """Bug: `python -m gpt2.plan 124m | head -1` ends in BrokenPipeError."""
    reads, writes = os.pipe()
    os.close(reads)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words], stdout=writes, stderr=subprocess.PIPE, env=environment, timeout=120
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "words",
    [
        ["gpt2.plan", "124m", "--write"],
        ["flows.reproduce", "demo"],
        ["flows.baseline", "124m"],
    ],
)
def test_a_store_that_cannot_be_written_is_one_line(words: list[str], tmp_path: Path) -> None:
    """Bug: a traceback. (A file in the store's place refuses root too, whom a mode does not.)"""
    (tmp_path / "file").write_text("")
    done = run(*words, f"runtime.store={tmp_path}/file/store")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and str(tmp_path / "file") in line


def test_a_read_only_store_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"runtime\.store="):
        configure("demo", None, None, str(tmp_path / "store"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_training_in_a_read_only_store_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    status = report_failure(OSError(number, os.strerror(number), "/store/train/0f/.lock"), None)
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ") and "/store/train/0f/.lock" in line


def test_an_error_that_may_pass_is_not_the_user_s(capsys: pytest.CaptureFixture[str]) -> None:
    """A connection that was refused is worth another try: the task retries status 1, not 2."""
    assert report_failure(ConnectionRefusedError(errno.ECONNREFUSED, "refused"), None) == 1
