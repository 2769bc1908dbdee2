"""The machine and its environment: CPU cores, GPUs, the user's cache folder and environment variables; no torch.

Other modules of gpt2 read environment variables with `environment`, and these variables alone:

    CC                      C compiler of the BPE kernel
    CUDA_VISIBLE_DEVICES    read by `visible_gpus`
    GPT2_AUTOTUNE_CACHE     folder of measured kernel choices; nothing is kept without it
    GPT2_COMMIT             commit of the code where it runs without .git, as in an image
    HF_TOKEN                token with write access, to upload a model to the Hub
    TRITON_INTERPRET        1: run Triton kernels in Python on a CPU
    XDG_CACHE_HOME          read by `user_cache`

gpt2.distributed reads torchrun's variables, gpt2.tokenizer sets tiktoken's, `keep_compiled` sets those of compilers.
"""

from __future__ import annotations

import math
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from gpt2.errors import UserError

AUTOTUNE_CACHE = "GPT2_AUTOTUNE_CACHE"


def environment(name: str) -> str | None:
    """Value of an environment variable; None if it is unset or empty."""
    return os.environ.get(name) or None


def cpu_count() -> int:
    """Cores that this process may use: the smaller of its affinity and its cgroup's CPU quota, rounded up."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, math.ceil(cpu_quota() or cores)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Smallest CPU quota, in cores, of this process's cgroup (v1 or v2) and its ancestors; None if none is set.

    Args:
        root: folder that holds proc and sys/fs/cgroup.
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
        # v2 names no controller. A container may see the host's path, but its own cgroup at the root of the mount.
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
    """NVIDIA GPUs in the order of NVML and nvidia-smi, which is by PCI bus; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            Gpu(str(index), pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
            for index, handle in enumerate(handles)
        )
    except pynvml.NVMLError:
        return ()


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists, in its order; all GPUs if it is unset."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _all_gpus()
    tokens = [token.strip() for token in visible.split(",") if token.strip()]
    return tuple(gpu for token in tokens for gpu in _all_gpus() if token == gpu.number or gpu.uuid.startswith(token))


def gpu_names() -> tuple[str, ...]:
    """Names of the visible GPUs."""
    return tuple(gpu.name for gpu in visible_gpus())


def gpu_count(gpus: int | Literal["auto"]) -> int:
    """Number of GPUs that `runtime.gpus` stands for on this machine; 0 means that the CPU is used.

    Raises:
        UserError: `gpus` is larger than the number of visible GPUs.
    """
    visible = len(visible_gpus())
    if gpus == "auto":
        return visible
    if gpus > visible:
        raise UserError(f"runtime.gpus is {gpus}, this machine has {visible}: use runtime.gpus={visible} or auto")
    return gpus


def device_type(gpus: int | Literal["auto"]) -> Literal["auto", "cpu"]:
    """The device of a run: "cpu" if `runtime.gpus` is 0, else "auto", a GPU if torch finds one."""
    return "cpu" if gpus == 0 else "auto"


def user_cache(name: str) -> Path:
    """Folder for cached files: in XDG_CACHE_HOME or ~/.cache, or in the temporary folder if that is not writable.

    Code is loaded from it, so only this user can read or write it.
    """
    home = Path(environment("XDG_CACHE_HOME") or Path.home() / ".cache") / "reproduce-gpt2"
    temporary = Path(tempfile.gettempdir()) / f"reproduce-gpt2-{os.getuid()}"
    ours = next((folder for folder in (home, temporary) if _owner_only(folder)), None)
    folder = (ours or Path(tempfile.mkdtemp(prefix="reproduce-gpt2-"))) / name
    folder.mkdir(exist_ok=True)
    return folder


def _owner_only(folder: Path) -> bool:
    """Create `folder` or remove the access of other users to it; whether this user owns it and can write to it."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.lstat().st_uid == folder.stat().st_uid == os.getuid():  # else another user could place code in it
            folder.chmod(0o700)
            return os.access(folder, os.W_OK)
    return False


def keep_compiled() -> None:
    """Cache compiled code (Triton, torch.compile, FlashAttention-4) and measured kernel choices between starts.

    The user's cache holds them, not the store: they are executed, and a store may come from elsewhere. Variables that
    are set already keep their values.
    """
    folder = user_cache("compiled")
    for variable, name in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "flash-attn-4"),
        (AUTOTUNE_CACHE, "autotune"),
    ):
        os.environ.setdefault(variable, str(folder / name))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
