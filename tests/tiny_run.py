"""A training run small enough for tests: its directories, made the way the pipeline makes them, and its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from gpt2.config.runtime import Runtime
from gpt2.config.train import TrainConfig
from gpt2.plan import prepare
from gpt2.shards import ShardWriter
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import ShardEntry, TokenizeFacts, TrainFacts
from gpt2.stage.manifest import Request, write_model
from gpt2.tokenizer import EOT

CONFIG: dict[str, Any] = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 300},
    "optim": {"max_lr": 1e-2, "warmup_steps": 2},
    "total_batch_size": 192,  # 12 sequences: 1, 2 and 3 processes share them
    "max_steps": 12,
    "val": {"every": 4, "tokens": 512},
    "sample": {"every": 6, "tokens": 4, "prompts": []},  # GPT-2's tokens do not fit into so small a vocabulary
    "checkpoint": {"every": 4},
}
WHOLE_VOCABULARY: dict[str, Any] = {
    "model": {**CONFIG["model"], "vocab_size": 50_257},
    "sample": {"every": 6, "tokens": 4, "prompts": ["", "The"]},
}
TIMES = ("time", "train/step_ms", "train/tokens_per_second", "train/mfu")


def make_shards(store: Path, tokens: int = 4000, seed: int = 0, *, eot: bool = False) -> Request:
    """A finished tokenize stage whose text is a noisy cycle of 32 tokens, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    stream = (np.arange(tokens) % 32) * 7
    stream = np.where(rng.random(tokens) < 0.1, rng.integers(0, 224, tokens), stream)
    if eot:
        stream[::100] = EOT
    request = Request(stage="tokenize", version=1, config={"seed": seed, "tokens": tokens, "eot": eot})
    directory = prepare(request, Runtime(store=store))
    entries = []
    splits = (("val", stream[:600]), ("train", stream[600:2000]), ("train", stream[2000:]))
    for number, (split, part) in enumerate(splits):
        path = f"shards/tiny_{split}_{number:06d}.bin"
        with ShardWriter(directory / path) as shard:
            shard.write(part.astype(np.uint16))
        entries.append(ShardEntry(path=path, split=split, tokens=len(part)))  # type: ignore[arg-type]
    facts = TokenizeFacts(
        tokenizer="gpt2",
        backend="none",
        documents=None,
        train_tokens=tokens - 600,
        val_tokens=600,
        shards=tuple(entries),
    )
    StageDir(directory).finish([entry.path for entry in entries], facts)
    return request


def make_run(store: Path, shards: Request | None = None, runtime: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A train stage's directory, ready to be started."""
    shards = shards or make_shards(store)
    config = TrainConfig.model_validate({**CONFIG, **changes})
    request = Request(
        stage="train", version=1, config=config.model_dump(mode="json"), inputs={"shards": shards.address}
    )
    settings = {"gpus": 0, "micro_batch_size": 3, "log_every": 1, **(runtime or {})}
    return prepare(request, Runtime(store=store, **settings))


def set_runtime(directory: Path, **changes: Any) -> None:
    """Have the next start run in another way."""
    runtime = StageDir(directory).runtime.model_dump(mode="json")
    write_model(directory / "runtime.json", Runtime.model_validate({**runtime, **changes}))


def command(directory: Path, processes: int = 1, module: str = "gpt2.train") -> list[str]:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["gpt2.torchrun", f"--nproc-per-node={processes}", "-m"]
    return [*start, module, str(directory)]


def faulty(directory: Path, processes: int, cause: str, phase: str, rank: int, step: int = 5) -> list[str]:
    """The command of a run that is struck by a fault."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "gpt2.torchrun", f"--nproc-per-node={processes}"]
    return [
        *start,
        str(Path(__file__).with_name("faulty_train.py")),
        str(directory),
        cause,
        phase,
        str(rank),
        str(step),
    ]


def start(
    directory: Path, processes: int = 1, words: list[str] | None = None, *, gpu: bool = False, **options: Any
) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
    }
    return subprocess.Popen(
        words or command(directory, processes), env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, **options,
    )  # fmt: skip


def run(directory: Path, processes: int = 1, expect: int | None = 0, timeout: float = 120, **options: Any) -> str:
    """Start the stage and wait for it; what it printed."""
    process = start(directory, processes, **options)
    output, _ = process.communicate(timeout=timeout)
    assert expect is None or process.returncode == expect, f"status {process.returncode}:\n{output}"
    return output


def result(directory: Path) -> dict[str, Any]:
    """Everything that must be equal between two runs: weights, moments, every line of metrics and samples."""
    facts = StageDir(directory).facts(TrainFacts)
    folder = directory / facts.checkpoint
    state = json.loads((folder / "state.json").read_bytes())
    return {
        "weights": load_file(folder / "model.safetensors"),
        "moments": load_file(folder / "optimizer.safetensors"),
        "metrics": lines(directory / "metrics.jsonl"),
        "samples": lines(directory / "samples.jsonl"),
        "losses": (state["losses"], state["grad_norms"], state["passed_over"], state["skips"]),
    }


def steps(directory: Path) -> list[int]:
    """Of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("step_")) for path in (directory / "checkpoints").glob("step_*"))


def lines(path: Path) -> list[dict[str, Any]]:
    """A .jsonl file without what depends on the clock."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bit for bit."""
    for kind in ("weights", "moments"):
        assert a[kind].keys() == b[kind].keys()
        different = [name for name in a[kind] if not a[kind][name].equal(b[kind][name])]
        assert not different, f"{kind} differ: {different[:3]}"
    for kind in ("metrics", "samples", "losses"):
        assert a[kind] == b[kind], f"{kind} differ"
