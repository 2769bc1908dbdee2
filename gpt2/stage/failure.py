"""failure.json: why a stage's process failed, for the process that started it."""

from __future__ import annotations

import traceback
from contextlib import suppress
from pathlib import Path
from typing import Literal

from gpt2.config.section import Section
from gpt2.errors import UserError, describe, presentable
from gpt2.stage.manifest import read_model, write_model

FAILURE = "failure.json"


class Failure(Section):
    kind: Literal["user", "crash", "interrupted"]
    """user: the input has to change first; crash: the same command may succeed; interrupted: by SIGTERM or SIGINT"""
    message: str
    """one line for "user" and "interrupted"; type and text of the exception for "crash" """
    rank: int = 0
    """of the process that failed first"""


def error_message(error: BaseException) -> str:
    """The text of a UserError, the reason and file of an OSError, type and text of any other exception."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and str(error):
        return describe(error)
    return presentable("".join(traceback.format_exception_only(error)).strip())


def write_failure(directory: Path, failure: Failure) -> None:
    """Write failure.json into a stage's directory, if it exists and can be written."""
    if directory.is_dir():
        with suppress(OSError, UserError):
            write_model(directory / FAILURE, failure)


def read_failure(directory: Path) -> Failure | None:
    """The failure of the last start; None if there is none."""
    try:
        return read_model(directory / FAILURE, Failure)
    except (OSError, UserError):
        return None


def clear_failure(directory: Path) -> None:
    """Delete the failure.json of an earlier start."""
    with suppress(OSError):
        (directory / FAILURE).unlink(missing_ok=True)
