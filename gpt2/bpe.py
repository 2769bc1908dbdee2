"""Choosing an encoder."""

from __future__ import annotations

from gpt2.encoder import Encoder, TiktokenEncoder


def make_encoder(backend: str, *, quiet: bool = False) -> Encoder:
    return TiktokenEncoder()
