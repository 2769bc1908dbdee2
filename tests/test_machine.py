"""What the machine offers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from gpt2 import machine
from gpt2.errors import UserError
from gpt2.machine import cpu_count, cpu_quota, device_type, gpu_count, gpu_names, visible_gpus


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3.0),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/docker/0a1b\n0::/",  # the host's path, the container's mount
          "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 1.5),
        ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"proc/self/cgroup": "1:memory:/x", "sys/fs/cgroup/cpu.max": "100000 100000"}, None),
        ({}, None),
    ],
    ids=["v2", "v2 parent", "v2 none", "v1 container", "v1 none", "other controller", "no cgroups"],
)  # fmt: skip
def test_the_quota_of_a_container_counts(files: dict[str, str], expected: float | None, tmp_path: Path) -> None:
    """Catches: 64 tokenizing processes in a container that has the time of two cores."""
    assert cpu_quota(make(tmp_path, files)) == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.5, 1), (2.5, 3), (64.0, 8)])
def test_workers_are_bounded_by_affinity_and_quota(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: no worker at all under a quota below one core; more workers than cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert cpu_count() == expected


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A driver with two GPUs."""
    machine._all_gpus.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{'ab'[handle]}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: f"NVIDIA L{handle + 1}")
    yield monkeypatch
    machine._all_gpus.cache_clear()


@pytest.mark.parametrize(
    ("visible", "numbers"), [(None, "01"), ("1,0", "10"), ("GPU-b", "1"), ("", ""), ("7", ""), (" 1 ", "1")]
)
def test_cuda_visible_devices_selects_and_orders_gpus(
    visible: str | None, numbers: str, nvml: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        nvml.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(gpu.number for gpu in visible_gpus()) == numbers
    assert gpu_count("auto") == len(numbers) and gpu_count(0) == 0


def test_more_gpus_than_visible_are_refused(nvml: pytest.MonkeyPatch) -> None:
    """Bug: fewer processes than configured, which changes the memory that each one needs."""
    assert gpu_names() == ("NVIDIA L1", "NVIDIA L2") and gpu_count(2) == 2
    with pytest.raises(UserError, match=r"is 3, .* has 2"):
        gpu_count(3)


def test_without_a_driver_there_is_no_gpu(nvml: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    nvml.setattr(pynvml, "nvmlInit", absent)
    assert visible_gpus() == () and gpu_count("auto") == 0
    assert (device_type("auto"), device_type(0), device_type(1)) == ("auto", "cpu", "auto")


def test_another_system_gets_one_clear_error() -> None:
    """Catches: AttributeError: module 'os' has no attribute 'sched_getaffinity', after the download."""
    program = "import sys; sys.platform = 'darwin'; import gpt2"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode and "Linux" in done.stderr.splitlines()[-1] and "darwin" in done.stderr.splitlines()[-1]
