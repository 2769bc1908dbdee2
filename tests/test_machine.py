"""What the machine offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2 import machine
from gpt2.machine import cpu_count, cpu_quota


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


def test_another_system_gets_one_clear_error() -> None:
    """Catches: AttributeError: module 'os' has no attribute 'sched_getaffinity', after the download."""
    program = "import sys; sys.platform = 'darwin'; import gpt2"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode and "Linux" in done.stderr.splitlines()[-1] and "darwin" in done.stderr.splitlines()[-1]
