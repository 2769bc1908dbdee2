"""A recipe at toy size, and flows on it as commands."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from gpt2.config.recipe import load
from gpt2.plan import Plan, plan

STEPS = 40
TOY = {
    "download": {"source": {"kind": "installed-docs", "max_bytes": 400_000}},
    "tokenize": {"prefix": "docs", "shard_tokens": 30_000, "val_tokens": 20_000},
    "benchmarks": {"continuation": {"kind": "continuation", "examples": 20, "context_tokens": 24, "ending_tokens": 12}},
    "evaluate": {"val_tokens": 8192, "benchmarks": ["continuation"]},
}
TRAIN = {
    "optim": {"max_lr": 3.0e-3, "warmup_steps": 4},
    "total_batch_size": 512,
    "max_steps": STEPS,
    "val": {"every": 10, "tokens": 4096},
    "benchmark": "continuation",
    "benchmark_every": 20,
    "sample": {"every": 20, "tokens": 8},
    "checkpoint": {"every": 10},
}


def recipe(folder: Path, name: str, **model: int) -> Path:
    """conf/<name>.yaml at toy size."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, **model}
    tree = {"name": name, **TOY, "train": {**TRAIN, "model": shape}, "report": {"title": f"Toy {name}"}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(path: Path, store: Path, *overrides: str, module: str = "flows.reproduce") -> list[str]:
    words = [sys.executable, "-m", module, str(path), f"runtime.store={store}", "runtime.log_every=1"]
    return [*words, *overrides]


def environment() -> dict[str, str]:
    """The environment without Prefect's and MLflow's variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}


def run(path: Path, store: Path, *overrides: str, status: int = 0, module: str = "flows.reproduce") -> str:
    """Run a flow until it exits; its output."""
    done = subprocess.run(
        command(path, store, *overrides, module=module), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def planned(path: Path, store: Path, **overrides: object) -> Plan:
    return plan(load(str(path), overrides), store)
