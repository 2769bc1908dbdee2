"""Difficult text for encoders: the fixed sample that bpe.c must encode correctly, and random text for fuzzing."""

from __future__ import annotations

import random

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ   ",
    "etaoin shrdlu'stdmlvre''  ",
    "0123456789 .,-\n",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ a1\n",
    " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u3000a.",
    "àéîõüßæøñçÅÆ ŁŚŻabc'",
    "абвгдежзиклмнопрстуф ІЇєґ",
    "αβγδεζηθικλμνξοπρστυφχψω ΆΈ",
    "אבגדהוזחטי \u200f\u200eاآبةتثجحخد ",
    "नमस्तेदुनियाअआइई ।०१२३",
    "東京都日本語中文汉字漢 。、「」アイウあいう한국어ㄱ",
    "😀😃🙂👨\u200d👩\u200d👧🏽❤️🇩🇪 ✓★→ ",
    "①②ⅣⅫ½¾²³٣४໑𝟘𝟙 ",
    "\x00\x01\x7f\u0300\u0301\u20dd\ufeff\ufffd\ufffe\U0010ffff\ue000 ab1",
)


def random_document(rng: random.Random, longest: int = 400) -> str:
    """Difficult text: letters of one script or of all, runs of one character, code, contractions."""
    kind = rng.randrange(8)
    size = rng.randrange(1, longest)
    if kind < 3:
        return "".join(rng.choices(rng.choice(ALPHABETS), k=size))
    if kind == 3:
        return "".join(rng.choices("".join(ALPHABETS), k=size))
    if kind == 4:
        return "".join(
            rng.choice("".join(ALPHABETS)) * rng.choice((1, 1, 2, 3, 15, 16, 17, 31, 32, 33, 70))
            for _ in range(size // 20 + 1)
        )
    if kind == 5:
        return "".join(_character(rng) for _ in range(size))
    if kind == 6:
        words = ["don't", "we'll", " they've", "I'd", "'tis", "x = [0] * n\n", "    return", "\tif (a&&b){", "</div>"]
        return "".join(rng.choices([*words, "\r\n", "://", "_id", " ", "\n\n", "  "], k=size // 4 + 1))
    return " ".join("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(1, 24))) for _ in range(size // 8 + 1))


def hard_document(rng: random.Random, longest: int = 400) -> str:
    """As random_document, but sometimes empty, with surrogates, or, rarely, of about a million characters. Not used for
    `sample_documents`: surrogates have no UTF-8, and startup must be fast."""
    if rng.random() < 1 / 30_000:
        return huge_document(rng, longest)
    if rng.random() < 1 / 50:
        return ""
    text = random_document(rng, longest)
    if rng.random() < 1 / 10:
        characters = list(text)
        for _ in range(rng.randrange(1, 8)):  # high or low, so that some make a pair
            characters.insert(rng.randrange(len(characters) + 1), chr(rng.randrange(0xD800, 0xE000)))
        return "".join(characters)
    return text


def huge_document(rng: random.Random, longest: int = 400, size: int = 1_000_000) -> str:
    """About `size` characters: many documents, one repeated document, or a run of one character between two documents
    (tiktoken's regex engine fails on such a run of white space)."""
    kind = rng.randrange(3)
    if kind == 0:
        parts, length = [""], 0
        while length < size:
            parts.append(random_document(rng, longest))
            length += len(parts[-1])
        return "".join(parts)
    one = random_document(rng, longest) if kind == 1 else rng.choice("".join(ALPHABETS))
    return random_document(rng, longest) + one * (size // len(one) + 1) + random_document(rng, longest)


def _character(rng: random.Random) -> str:
    """A random character, half of the time from the basic plane."""
    while True:
        code = rng.randrange(0x10000) if rng.random() < 0.5 else rng.randrange(0x110000)
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def sample_documents() -> list[str]:
    """The fixed sample that a NativeEncoder must encode correctly before use."""
    rng = random.Random(20240520)
    fixed = ["", " ", "'", "'s", " '", "<|endoftext|>"]
    runs = ["a" * 1000, " " * 700 + "x", "\n" * 300, "7" * 500, "=" * 257, "é" * 40]
    return [*fixed, *runs, *(random_document(rng) for _ in range(400))]
