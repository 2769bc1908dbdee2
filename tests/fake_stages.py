"""Stages without work, in real processes and the real frame (gpt2.stage.directory), for tests of the flows.

Started as `python -m fake_stages DIRECTORY`. The variable FAKE_STAGES sets actions as JSON {stage: action}: "user
error", "bug", "crash once" (SIGKILL in a directory's first session), "wait" (until SIGTERM, then write a file), or
"stop at N" (training fails after step N in a directory's first session).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from gpt2.errors import UserError
from gpt2.stage.directory import StageDir, main
from gpt2.stage.facts import (
    BenchmarkFacts,
    DownloadFacts,
    EvaluateFacts,
    Facts,
    HarnessFacts,
    ReportFacts,
    Score,
    ShardEntry,
    TokenizeFacts,
    TrainFacts,
)
from gpt2.stage.metrics import cut_after_step

CHECKPOINT_EVERY = 4


def work(directory: StageDir) -> None:
    stage = directory.request.stage
    with open(directory.path / "sessions", "a") as file:
        file.write(f"{os.getpid()}\n")
    print(f"running {stage}", flush=True)
    action = json.loads(os.environ.get("FAKE_STAGES", "{}")).get(stage, "")
    first = len((directory.path / "sessions").read_text().splitlines()) == 1
    if action == "user error":
        raise UserError("shard 7 holds 3 tokens, its header says 4; delete it and run again")
    if action == "bug":
        raise ValueError("a bug")
    if action == "crash once" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "wait":
        _wait(directory.path)
    files, facts = MAKE[stage](directory, action if first else "")
    directory.finish(files, facts)


def _wait(path: Path) -> None:
    def save(number: int, frame: object) -> None:
        (path / "saved").write_text(signal.Signals(number).name)
        print("saved", flush=True)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, save)
    (path / "waiting").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def _write(directory: StageDir, name: str, text: str) -> str:
    (directory.path / name).parent.mkdir(parents=True, exist_ok=True)
    (directory.path / name).write_text(text)
    return name


def download(directory: StageDir, action: str) -> tuple[list[str], Facts]:
    name = _write(directory, "data/00000-a.txt", "text\n")
    return [name], DownloadFacts(kind="local", text_column=None, files=(name,), total_bytes=5, origin="fake")


def tokenize(directory: StageDir, action: str) -> tuple[list[str], Facts]:
    directory.input("corpus")
    metrics = directory.metrics()
    for done in (50, 100):
        metrics.write(done, done=done, total=100, unit="bytes")
    names = [_write(directory, f"shards/{n}.bin", n * 10) for n in ("val", "train")]
    shards = (
        ShardEntry(path=names[0], split="val", tokens=30),
        ShardEntry(path=names[1], split="train", tokens=50),
    )
    return names, TokenizeFacts(
        tokenizer="gpt2", backend="none", documents=1, train_tokens=50, val_tokens=30, shards=shards
    )


def benchmark(directory: StageDir, action: str) -> tuple[list[str], Facts]:
    name = _write(directory, "benchmark.json", "{}")
    return [name], BenchmarkFacts(kind="continuation", examples=4, chance=0.25, origin="fake")


def train(directory: StageDir, action: str) -> tuple[list[str], Facts]:
    """Losses are a function of configuration and step; a checkpoint every CHECKPOINT_EVERY steps."""
    config = directory.request.config
    checkpoint = directory.path / "checkpoint"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    cut_after_step(directory.path / "metrics.jsonl", start)
    metrics = directory.metrics()
    steps, lr = config["max_steps"], config["optim"]["max_lr"]
    stop = int(action.removeprefix("stop at ")) if action.startswith("stop at ") else None
    for step in range(start + 1, steps + 1):
        tokens = step * config["total_batch_size"]
        values = {"train/loss": 11 - lr * 1000 * step, "train/lr": lr, "train/tokens": tokens}
        metrics.write(step, done=step, total=steps, unit="steps", **values)
        if step % 2 == 0:
            metrics.write(step, **{"val/loss": 11 - lr * 1000 * step + 0.1, "train/tokens": tokens})
        if step % CHECKPOINT_EVERY == 0:
            checkpoint.write_text(str(step))
        if step == stop:
            raise RuntimeError(f"stopped at step {step}")
    name = _write(directory, "checkpoints/step_00000001/model.safetensors", f"{lr}")
    return [name], TrainFacts(
        steps=steps, tokens=steps * config["total_batch_size"], n_params=1, train_loss=1.0, val_loss=2.0,
        train_seconds=1.0, total_seconds=2.0, tokens_per_second=10.0, flops_per_token=6.0, mfu=None, device="cpu",
        world_size=1, precision="fp32", checkpoint="checkpoints/step_00000001",
    )  # fmt: skip


def evaluate(directory: StageDir, action: str) -> tuple[list[str], Facts]:
    names = [role.partition(":")[2] for role in directory.request.inputs if ":" in role]
    scores = {name: Score(acc=0.3, acc_norm=0.35, examples=4, chance=0.25) for name in names}
    name = _write(directory, "scores.json", "{}")
    return [name], EvaluateFacts(val_loss=2.0, val_tokens=30, scores=scores, skipped=directory.request.hints["skipped"])


def harness(directory: StageDir, action: str) -> tuple[list[str], Facts]:
    tasks = directory.request.config["tasks"]
    name = _write(directory, "results.json", "{}")
    return [name], HarnessFacts(version="0", figures={task: {"acc": 0.4} for task in tasks})


def report(directory: StageDir, action: str) -> tuple[list[str], Facts]:
    names = [
        _write(directory, "report.md", f"# {directory.request.config['title']}\n\n![loss](plots/loss.png)\n"),
        _write(directory, "report.html", "<h1>report</h1>"),
        _write(directory, "plots/loss.png", "not an image"),
    ]
    return names, ReportFacts(headline={"val_loss": 2.0})


MAKE = {f.__name__: f for f in (download, tokenize, benchmark, train, evaluate, harness, report)}

if __name__ == "__main__":
    main(work)
