"""The one exception that is meant for the person at the terminal, and what its text may hold."""

from __future__ import annotations

import errno
import re

MESSAGE_CHARACTERS, VALUE_CHARACTERS = 2_000, 200
"""what is shown of a message, and of one value in it"""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""the disk, the user's quota, or `ulimit -f` is full"""
REFUSED = (
    *NO_SPACE,
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
"""the user has to change the file system, the file, its mode or the path; a retry does not help"""

_USER = re.compile(r"://(?:[^\s/\"<>]*|[^\s:/@\"<>]+:(?!\d+/)[^\s\"<>]*)@")
"""user:password before a host; a password may hold "/", but a number and a slash are a port"""
_QUERY = re.compile(
    r"([?&][^\s=&#]*(?:token|key|secret|passw|pwd|sig|auth|credential)[^\s=&#]*=)[^\s&#\"<>]+", re.IGNORECASE
)


class UserError(Exception):
    """Something the user can put right. Its text is one clear message: what is wrong, with both numbers where there
    are two, and the way out. Stage commands print it without a traceback and exit with status 2.

    Long messages are shortened in the middle, and credentials are removed from addresses.
    """

    def __init__(self, message: str) -> None:
        super().__init__(presentable(message))


def presentable(message: object) -> str:
    """Text or an exception's text without credentials, and not longer than a person reads."""
    return shorten(without_credentials(str(message)), MESSAGE_CHARACTERS)


def without_credentials(text: str) -> str:
    """`text` with neither user:password nor the tokens of queries in the addresses that it holds."""
    return _QUERY.sub(r"\1***", _USER.sub("://", text))


def shorten(text: str, limit: int = VALUE_CHARACTERS) -> str:
    """`text` if it has at most `limit` characters, else its two ends and how much is left out between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def describe(error: OSError) -> str:
    """The system's reason and the file of an OSError, in one line."""
    if error.errno in NO_SPACE:
        where = f" for {error.filename}" if error.filename else ""
        return presentable(f"no space left{where}: free some and run again, finished work is kept")
    hint = "; choose another store with runtime.store=FOLDER" if error.errno == errno.EROFS else ""
    return presentable(f"{error.strerror}: {error.filename}{hint}" if error.filename else error)
