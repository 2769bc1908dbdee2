"""Retries with exponential backoff, jitter and Retry-After."""

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
"""HTTP statuses that a retry may resolve"""


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of retries. A try that receives new bytes resets the count."""

    max_tries: int = 12
    initial_backoff: float = 0.5
    """seconds; doubled at each failure in a row"""
    max_backoff: float = 30.0
    max_retry_after: float = 300.0
    """seconds; the Hub's rate limits apply to windows of five minutes"""


DEFAULT_POLICY = RetryPolicy()


class Retrier:
    """Waits after each failure and raises after `max_tries` in a row."""

    def __init__(self, action: str, retry_policy: RetryPolicy, stop: threading.Event) -> None:
        self.action = action
        self.retry_policy = retry_policy
        self.stop = stop
        self.failures = 0

    def progressed(self) -> None:
        self.failures = 0

    def failed(self, error: Exception, fatal: str | None) -> None:
        """Wait for the next try.

        Args:
            fatal: the message for an error that a retry does not resolve, else None.

        Raises:
            UserError: `fatal` is given, or `max_tries` tries in a row failed.
        """
        if fatal is not None:
            raise UserError(fatal) from error
        self.failures += 1
        if self.failures >= self.retry_policy.max_tries:
            raise UserError(
                f"could not {self.action}, {self.failures} tries in a row: {first_line(error)}; check the network and "
                "HF_ENDPOINT and run again, the download resumes"
            ) from error
        backoff = min(self.retry_policy.max_backoff, self.retry_policy.initial_backoff * 2 ** (self.failures - 1))
        seconds = backoff * random.uniform(0.75, 1.25)  # so that workers do not retry at the same time
        retry_after = _retry_after(error)
        if retry_after is not None:
            # Not below the backoff: repeated Retry-After: 0 would use all tries within seconds.
            seconds = max(seconds, min(retry_after, self.retry_policy.max_retry_after) + random.uniform(0.0, 0.5))
        if seconds >= 5:
            print(f"could not {self.action} ({first_line(error)}); retrying in {seconds:.0f} s", flush=True)
        self.stop.wait(seconds)


def _retry_after(error: Exception) -> float | None:
    """Seconds to wait by the response's Retry-After (seconds or a date) or RateLimit header."""
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
