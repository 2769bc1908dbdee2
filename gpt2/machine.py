"""Looking at the machine, without torch."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

CHOICES = "GPT2_CHOICES"
"""environment variable: where gpt2.kernels.choices keeps what it is told; without it nothing is kept"""


def cpu_count() -> int:
    """Cores that this process may use: its affinity's, or its cgroup's CPU quota, rounded up, where that is less."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, math.ceil(cpu_quota() or cores)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota, in cores, of this process's cgroup (v1 or v2) and of those above it; None without one.

    Args:
        root: where proc and sys/fs/cgroup lie.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # v2 names no controller. A container may see the path on its host, and its own cgroup at the mount's root.
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        for folder in [group, *(above for above in group.parents if above.is_relative_to(mount))]:
            with suppress(OSError, ValueError):  # no such folder, or "max"
                if controllers:
                    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
                else:
                    quota, period = map(int, (folder / "cpu.max").read_text().split())
                if quota > 0 and period > 0:  # v1 has -1 for none
                    quotas.append(quota / period)
    return min(quotas, default=None)


@cache
def gpu_names() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [tuple(part.strip() for part in line.split(",", 2)) for line in listing.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [token.strip() for token in visible.split(",") if token.strip()]
        gpus = [gpu for token in wanted for gpu in gpus if token == gpu[0] or gpu[1].startswith(token)]
    return tuple(name for _, _, name in gpus)


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
