"""What was found fastest on this machine, kept from one start to the next: measuring it again takes seconds each time.

Kept beside what Triton compiles (see `gpt2.machine.keep_compiled`), one small file a question, so that several
processes may write at once. A question names all that its answer depends on: the GPU, the libraries' versions, the
shapes. Where torch is asked for deterministic algorithms nothing is measured, so nothing is asked here either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from gpt2.atomic import write_text
from gpt2.errors import UserError
from gpt2.machine import AUTOTUNE_CACHE, environment


def recall(question: Mapping[str, object]) -> str | None:
    """What `remember` was told about the same question, or None."""
    path = _path(question)
    if path is None:
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return str(kept["answer"]) if kept["question"] == _plain(question) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there or not whole: it is measured again


def remember(question: Mapping[str, object], answer: str) -> None:
    """Keep an answer. A folder that cannot be written to costs time at the next start and nothing else."""
    path = _path(question)
    if path is None:
        return
    try:
        write_text(path, json.dumps({"question": _plain(question), "answer": answer}, indent=1))
    except (OSError, UserError):  # no space is a UserError
        return


def _path(question: Mapping[str, object]) -> Path | None:
    folder = environment(AUTOTUNE_CACHE)
    if not folder or torch.are_deterministic_algorithms_enabled():
        return None
    name = hashlib.sha256(json.dumps(_plain(question), sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}.json"


def _plain(question: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in question.items()}
