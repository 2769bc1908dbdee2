"""Text that a model wrote may hold any character; on a page it must neither break the page nor vanish."""

from __future__ import annotations

import re

# what XML and HTML do not allow or what changes how the text around it is laid out: control characters, lone
# surrogates, direction overrides, non-characters
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff\u2028\u2029]")


def visible(text: str) -> str:
    """`text` with what cannot be shown replaced by a sign for it: a control character by its picture (U+2400 and on),
    anything else by the replacement character. Line ends become plain newlines; tabs stay."""
    return _UNSHOWABLE.sub(_sign, text.replace("\r\n", "\n").replace("\r", "\n"))


def _sign(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"
