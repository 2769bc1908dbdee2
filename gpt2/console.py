"""The frame around every command for a person: one line for what the user can put right, and no traceback when the
reader of a pipe leaves."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from gpt2.errors import UserError, describe

BROKEN_PIPE, INTERRUPTED = 141, 130
"""exit statuses: 128 and the signal's number, as shells have them"""


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit: with its status, or with 2 and one line for a UserError or an OSError."""
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()  # here, where a broken pipe is caught, and not when Python ends
    except UserError as error:
        fail(str(error), 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
            sys.exit(BROKEN_PIPE)
        fail(describe(error), 2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(status)


def _reader_left() -> bool:
    """Whether stdout is a pipe that no process reads; else the broken pipe is another one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def fail(message: str, status: int) -> NoReturn:
    """One line on stderr that launchers recognise, then exit."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
