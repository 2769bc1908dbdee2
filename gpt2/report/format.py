"""Numbers as people read them. A number that is not known, or not finite, is a dash."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

DASH = "–"
_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, digits: int) -> str:
    """3.28100 -> "3.2810" for 4 digits, with separators of thousands."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def whole(value: float | None) -> str:
    return fixed(value, 0)


def short(value: float | None, digits: int = 3) -> str:
    """Three significant digits and a letter: 10_255_073_280 -> "10.3B", 524_288 -> "524k"."""
    if value is None or not math.isfinite(value):
        return DASH
    for size, letter in _LARGE:
        if abs(value) >= size * (1 - 0.5 * 10**-digits):
            return f"{significant(value / size, digits)}{letter}"
    return significant(value, digits)


def significant(value: float, digits: int = 3) -> str:
    """Rounded to significant digits, without an exponent and without trailing zeros after the point."""
    if value == 0:
        return "0"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float | None) -> str:
    """8.2e18 -> "8.20e18": the way FLOPs and learning rates are written."""
    if value is None or not math.isfinite(value):
        return DASH
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def rate(value: float) -> str:
    """A learning rate as recipes write it: 0.0006 -> "6e-4", 0.00025 -> "2.5e-4", 0 -> "0"."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(fraction: float | None, digits: int = 1) -> str:
    if fraction is None or not math.isfinite(fraction):
        return DASH
    exact = 100 * Decimal(repr(fraction))  # of what is printed elsewhere: 0.2945 is 29.5 %, its float a hair less
    return f"{exact.quantize(Decimal(10) ** -digits, ROUND_HALF_UP)}\N{NO-BREAK SPACE}%"


def duration(seconds: float | None) -> str:
    """5_640 -> "1 h 34 min"; two units at most."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} days {hours % 24} h"


def hours(value: float | None) -> str:
    """Three significant digits: 0.0412 -> "0.0412 h", 94.1 -> "94.1 h"."""
    return DASH if value is None or not math.isfinite(value) else f"{significant(value)} h"


def dollars(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"${value:,.0f}" if value >= 100 else f"${value:,.2f}"


def size(value: float) -> str:
    """Bytes in powers of ten: 46_100_000_000 -> "46.1 GB"."""
    for scale, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{significant(value / scale)} {letter}"
    return f"{value:,.0f} bytes"


def plural(count: int, noun: str, many: str | None = None) -> str:
    """(1, "step") -> "1 step", (3, "step") -> "3 steps"."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def short_commit(commit: str) -> str:
    """Twelve digits, and the "+" that says files differed from it."""
    return commit[:12] + ("+" if commit.endswith("+") else "")
