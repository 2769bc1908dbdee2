"""Which version of this project runs: release and commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from gpt2.machine import environment

COMMIT = "GPT2_COMMIT"
"""environment variable, set where the code runs without its history"""


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+" when files differ from it. Outside a checkout, as in an
    image, what `COMMIT` says; None where nothing does."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return environment(COMMIT)
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def code_version() -> str:
    """Release and commit, e.g. "0.1.0 (commit 167b0ac4f9d2)"; recorded in manifests."""
    try:
        release = importlib.metadata.version("reproduce-gpt2")
    except importlib.metadata.PackageNotFoundError:
        release = "unreleased"
    commit = git_commit()
    return f"{release} (commit {short(commit)})" if commit else release


def short(commit: str) -> str:
    return commit[:12] + ("+" if commit.endswith("+") else "")
