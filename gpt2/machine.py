"""Looking at the machine, without torch."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

AUTOTUNE_CACHE = "GPT2_AUTOTUNE_CACHE"
"""environment variable: the folder of gpt2.kernels.autotune_cache; if unset, nothing is cached"""


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


def user_cache(name: str) -> Path:
    """A folder for files that can be made again, below XDG_CACHE_HOME or ~/.cache, or below the temporary folder where
    that is not writable. Code is loaded from it, so only this user can read or write it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reproduce-gpt2"
    temporary = Path(tempfile.gettempdir()) / f"reproduce-gpt2-{os.getuid()}"
    ours = next((folder for folder in (home, temporary) if _owner_only(folder)), None)
    folder = (ours or Path(tempfile.mkdtemp(prefix="reproduce-gpt2-"))) / name
    folder.mkdir(exist_ok=True)
    return folder


def _owner_only(folder: Path) -> bool:
    """Create `folder` unless it exists, and close it to other users; whether it is this user's and writable."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.lstat().st_uid == folder.stat().st_uid == os.getuid():  # else another user could place code in it
            folder.chmod(0o700)
            return os.access(folder, os.W_OK)
    return False


def keep_compiled() -> None:
    """Have Triton, torch.compile and FlashAttention-4 keep what they compile, and the kernels what they measured, in
    the user's cache, so that the next start does neither. Not in the store: these files are executed, and a store may
    come from elsewhere. What the user has set stands."""
    folder = user_cache("compiled")
    for variable, name in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "flash-attn-4"),
        (AUTOTUNE_CACHE, "autotune"),
    ):
        os.environ.setdefault(variable, str(folder / name))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
