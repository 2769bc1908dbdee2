"""Looking at the machine, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

CHOICES = "GPT2_CHOICES"
"""environment variable: where gpt2.kernels.choices keeps what it is told; without it nothing is kept"""


def cpu_count() -> int:
    """Cores this process may use (affinity and cgroup-aware where Python is)."""
    return len(os.sched_getaffinity(0))


class Gpu(NamedTuple):
    number: str
    uuid: str
    name: str


@cache
def _all_gpus() -> tuple[Gpu, ...]:
    """The machine's NVIDIA GPUs in nvidia-smi's order; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(
        Gpu(*(part.strip() for part in line.split(",", 2))) for line in listing.splitlines() if line.count(",") >= 2
    )


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _all_gpus()
    wanted = [token.strip() for token in visible.split(",") if token.strip()]
    return tuple(gpu for token in wanted for gpu in _all_gpus() if token == gpu.number or gpu.uuid.startswith(token))


def gpu_names() -> tuple[str, ...]:
    """Names of the visible GPUs."""
    return tuple(gpu.name for gpu in visible_gpus())


def keep_compiled(store: Path) -> None:
    """Have Triton, torch.compile and FlashAttention-4 keep what they compile beside the stages, and the kernels what
    they measured, so that the next start does neither, in a new container too. What the user has set stands."""
    for variable, name in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "flash-attn-4"),
        (CHOICES, "choices"),
    ):
        os.environ.setdefault(variable, str((store / ".compiled" / name).absolute()))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
