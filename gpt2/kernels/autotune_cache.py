"""A cache on disk of the fastest implementations measured on this machine: measuring takes seconds at each start.

Each entry is one small file, so several processes can write at once; `gpt2.machine.keep_compiled` sets the folder. The
key holds everything that the result depends on: the GPU, the libraries' versions, the shapes. With deterministic
algorithms nothing is measured, and the cache is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from gpt2.atomic import write_text
from gpt2.errors import UserError
from gpt2.machine import AUTOTUNE_CACHE, environment


def load(key: Mapping[str, object]) -> str | None:
    """The value stored under `key`, or None; None also for a damaged file, so that it is measured again."""
    if path := _path(key):
        with suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["key"] == _strings(key):
                return str(entry["value"])
    return None


def store(key: Mapping[str, object], value: str) -> None:
    """Store `value` under `key`. A folder that cannot be written is ignored: it only costs time at the next start."""
    if path := _path(key):
        with suppress(OSError, UserError):  # a full disk is a UserError
            write_text(path, json.dumps({"key": _strings(key), "value": value}, indent=1))


def _path(key: Mapping[str, object]) -> Path | None:
    folder = environment(AUTOTUNE_CACHE)
    if not folder or torch.are_deterministic_algorithms_enabled():
        return None
    name = hashlib.sha256(json.dumps(_strings(key), sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}.json"


def _strings(key: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in key.items()}
