"""Trying again: how often, how long to wait between, and when to stop."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from dataclasses import dataclass

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from gpt2.errors import UserError, without_credentials

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""statuses of answers that may be others in a while"""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to try again. A try that brought new bytes starts the count anew."""

    max_tries: int = 12
    initial_backoff: float = 0.5
    """seconds; doubled at each further failure"""
    max_backoff: float = 30.0
    max_retry_after: float = 300.0
    """of a Retry-After: the Hub counts requests in windows of five minutes"""


DEFAULT_POLICY = RetryPolicy()


class Retrier:
    """Waits after each failure, longer each time, and gives up after too many in a row."""

    def __init__(self, what: str, retry_policy: RetryPolicy, stop: threading.Event) -> None:
        self.what = what
        self.retry_policy = retry_policy
        self.stop = stop
        self.failures = 0

    def progressed(self) -> None:
        self.failures = 0

    def failed(self, error: Exception, fatal: str | None) -> None:
        """Wait, unless `hopeless` says why that is no use.

        Raises:
            UserError: it is no use, or it failed too often.
        """
        if fatal is not None:
            raise UserError(fatal) from error
        self.failures += 1
        if self.failures >= self.retry_policy.max_tries:
            raise UserError(
                f"could not {self.what}, {self.failures} tries in a row: {first_line(error)}; check the network and "
                "HF_ENDPOINT and run again, it goes on where it stopped"
            ) from error
        backoff = min(self.retry_policy.max_backoff, self.retry_policy.initial_backoff * 2 ** (self.failures - 1))
        seconds = backoff * random.uniform(0.75, 1.25)  # so that the workers do not come back all at once
        asked = _retry_after(error)
        if asked is not None:
            # Never sooner than the backoff: an answer that says 0 again and again would use up the tries in seconds.
            seconds = max(seconds, min(asked, self.retry_policy.max_retry_after) + random.uniform(0.0, 0.5))
        if seconds >= 5:
            print(f"could not {self.what} ({first_line(error)}); trying again in {seconds:.0f} s", flush=True)
        self.stop.wait(seconds)


def _retry_after(error: Exception) -> float | None:
    """Seconds that the answer asks to wait: Retry-After in seconds or as a date, or the Hub's own RateLimit."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
        except ValueError:
            pass
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def first_line(error: BaseException) -> str:
    text = without_credentials(" ".join(str(error).split("\n")).strip())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
