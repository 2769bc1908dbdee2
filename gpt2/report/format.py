"""Numbers as text. A value that is None or not finite becomes a dash."""

from __future__ import annotations

import math
import re
import time
from decimal import ROUND_HALF_UP, Decimal
from typing import TypeGuard

import humanize

DASH = "–"
_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def fixed(value: float | None, digits: int = 0) -> str:
    """3.28100 -> "3.2810" for 4 digits, with thousands separators."""
    return f"{value:,.{digits}f}" if finite(value) else DASH


def short(value: float | None, digits: int = 3) -> str:
    """Significant digits and a letter: 10_255_073_280 -> "10.3B", 524_288 -> "524k"."""
    if not finite(value):
        return DASH
    for size, letter in _LARGE:
        if abs(value) >= size * (1 - 0.5 * 10**-digits):
            return f"{significant(value / size, digits)}{letter}"
    return significant(value, digits)


def significant(value: float, digits: int = 3) -> str:
    """Rounded to significant digits, without an exponent and without trailing zeros."""
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float | None) -> str:
    """8_240_000 -> "8.24e6", 0.0006 -> "6e-4", 0 -> "0"; at most four significant digits."""
    if not finite(value):
        return DASH
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def percent(fraction: float | None, digits: int = 1) -> str:
    if not finite(fraction):
        return DASH
    exact = 100 * Decimal(repr(float(fraction)))  # decimal: 0.2945 becomes 29.5 %, although its float is slightly less
    return f"{exact.quantize(Decimal(10) ** -digits, ROUND_HALF_UP)}\N{NO-BREAK SPACE}%"


def duration(seconds: float | None) -> str:
    """5_640 -> "1 h 34 min"."""
    if not finite(seconds):
        return DASH
    unit = "seconds" if seconds < 3600 else "minutes" if seconds < 48 * 3600 else "hours"
    digits = "%.1f" if seconds < 10 else "%.0f"
    text = humanize.precisedelta(seconds, minimum_unit=unit, format=digits, suppress=("years", "months"))
    return re.sub("(h|min|s)(?:our|ute|econd)s?", r"\1", re.sub("(?:,| and) ", " ", text))


def hours(value: float | None) -> str:
    """Three significant digits: 0.0412 -> "0.0412 h"."""
    return f"{significant(value)} h" if finite(value) else DASH


def dollars(value: float | None) -> str:
    return f"${fixed(value, 0 if value >= 100 else 2)}" if finite(value) else DASH


def plural(count: int, noun: str, many: str | None = None) -> str:
    """(1, "step") -> "1 step", (3, "step") -> "3 steps"."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


size = humanize.naturalsize  # 46_100_000_000 -> "46.1 GB"


def date(seconds: float) -> str:
    """A Unix time as a UTC date: "24 November 2025"."""
    return time.strftime("%d %B %Y", time.gmtime(seconds)).lstrip("0")


def short_commit(commit: str) -> str:
    """Twelve digits, and the "+" of a modified work tree."""
    return commit[:12] + ("+" if commit.endswith("+") else "")
