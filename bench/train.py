"""Measures training speed and the time per kind of kernel, and compares the loss with the reference path's.

    python -m bench.train --size 124m [--check] [--kernels reference] [--micro-batch-size 64]
    torchrun --standalone --nproc-per-node 8 -m bench.train --size 124m [--sharding zero1] [--beside ONE.json]

Times whole optimizer steps (`gpt2.train.step.train_step`) of the recipe's total batch, on random tokens with a Zipf
distribution. `--check` then trains twice over the same real tokens from the same weights, with the reference path and
with the fused kernels, and compares the losses of every step. With several processes rank 0 prints; the part of the
gradient all-reduce that does not overlap the backward pass is measured by leaving the all-reduce out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.loss_check import TrainRun, check, zipf_tokens
from gpt2.config.recipe import load
from gpt2.config.runtime import Runtime
from gpt2.config.train import TrainConfig
from gpt2.console import command
from gpt2.distributed import World, destroy_process_group, init_world
from gpt2.flops import mfu
from gpt2.kernels.fused_gpt import FusedGPT
from gpt2.machine import keep_compiled
from gpt2.train.build import device_name

LLMC = {"124m": 545_700, "350m": 200_400}
"""tokens/s of llm.c on one H100 80GB with the same total batch"""
KINDS = {
    "attention": ("sdpa", "flash", "fmha", "cudnn"),
    "LayerNorm": ("layer_norm",),
    "bias gradients": ("row_sum",),
    "GELU": ("gelu",),
    "8-bit copies": ("fp8_copies",),
    "cross-entropy": ("cross_entropy", "log_softmax", "nll_loss"),
    "embeddings": ("embedding", "index"),
    "optimizer and gradient norm": ("adam", "norm", "multi_tensor"),
    "matrix products": ("nvjet", "gemm", "cutlass", "xmma", "splitk", "cublas"),
}
"""kind of kernel -> substrings of GPU kernel names; the first match counts"""
CHECK_TOKENS, CHECK_STEPS, CHECK_LIMIT = 65_536, 200, 0.003


def time_steps(run: Callable[[int], object], steps: int, warmup: int) -> list[float]:
    """Milliseconds of each of `steps` steps after `warmup` steps; on a GPU by CUDA events."""
    for i in range(warmup):
        run(i)
    if not torch.cuda.is_available():
        times = []
        for i in range(steps):
            start = time.perf_counter()
            run(warmup + i)
            times.append(1000 * (time.perf_counter() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for i, event in enumerate(events[1:]):
        run(warmup + i)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def profile_kernels(run: Callable[[], object]) -> dict[str, float]:
    """GPU milliseconds of one call per kind of kernel, "other" last; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    milliseconds = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        milliseconds[kind] += event.self_device_time_total / 1000
    return milliseconds


def shard_in_store(store: Path) -> Path | None:
    """The largest first training shard in a store, or None."""
    shards = sorted(store.glob("tokenize/*/shards/*_train_000001.bin"), key=lambda path: path.stat().st_size)
    return shards[-1] if shards else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="124m", help="a recipe of conf/")
    parser.add_argument("--kernels", choices=("auto", "reference"), default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile, with --kernels reference")
    parser.add_argument("--fp8-head", action="store_true", help="set train.fp8_head=true")
    parser.add_argument("--micro-batch-size", type=int, help="in sequences; default: the largest that fits")
    parser.add_argument("--sharding", choices=("auto", "ddp", "zero1", "fsdp"), default="auto")
    parser.add_argument("--beside", type=Path, help="--json file of one process, for the scaling efficiency")
    parser.add_argument("--total-batch-size", type=int, help="tokens per step; default: the recipe's")
    parser.add_argument("--steps", type=int, default=10, help="number of timed steps")
    parser.add_argument("--check", action="store_true", help="compare the loss with the reference path")
    parser.add_argument("--check-steps", type=int, default=CHECK_STEPS)
    parser.add_argument("--check-batch-size", type=int, default=CHECK_TOKENS, help="tokens per step in --check")
    parser.add_argument("--floor", action="store_true", help="also compare the reference path with itself")
    parser.add_argument(
        "--tokens", type=Path, help="token shard (*.bin) of text, for --check; default: one in the store"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    if arguments.check and arguments.tokens is None:
        arguments.tokens = shard_in_store(Runtime().store)
    if arguments.check and arguments.tokens is None:
        parser.error(
            "--check needs --tokens SHARD.bin, a token shard of real text (python -m gpt2.plan prints the directories)"
        )
    overrides = {"train.total_batch_size": arguments.total_batch_size} if arguments.total_batch_size else {}
    if arguments.fp8_head:
        overrides["train.fp8_head"] = True
    config = load(arguments.size, overrides).train
    runtime = Runtime(
        kernels=arguments.kernels,
        compile=arguments.compile or ("auto" if arguments.kernels == "auto" else False),
        sharding=arguments.sharding,
        micro_batch_size=arguments.micro_batch_size or "auto",
    )
    keep_compiled()
    world = init_world()
    if world.is_main and world.device.type != "cuda":
        print("warning: torch finds no GPU: measuring the CPU; nvidia-smi lists the GPUs", file=sys.stderr)
    show = print_figures if world.is_main else lambda figures: None
    figures: dict[str, float] = {}
    if arguments.steps:
        figures = speed(config, runtime, world, arguments.steps)
        if arguments.size in LLMC and world.device.type == "cuda":
            figures["ratio to llm.c"] = figures["tokens/s"] / LLMC[arguments.size] / world.size
        if arguments.beside:
            alone = json.loads(arguments.beside.read_text())["tokens/s"]
            figures["scaling efficiency %"] = 100 * figures["tokens/s"] / world.size / alone
        show(figures)
    passed = True
    if arguments.check:
        # the recipe's schedule: docs/speed.md shows the effect of a shorter warm-up
        check_config = config.model_copy(update={"total_batch_size": arguments.check_batch_size})
        micro = min(arguments.micro_batch_size or 16, 16, check_config.sequences_per_step // world.size)
        compared = check(check_config, runtime, world, arguments.tokens, micro, arguments.check_steps, arguments.floor)
        show(compared)
        figures |= compared
        passed = abs(compared["mean difference"]) < CHECK_LIMIT and abs(compared["mean of quarter 4"]) < CHECK_LIMIT
        if world.is_main:
            print(f"loss curve {'within' if passed else 'NOT within'} {CHECK_LIMIT} nats of the reference path's")
    if arguments.json and world.is_main:
        arguments.json.write_text(json.dumps(figures, indent=2))
    destroy_process_group()
    return 0 if passed else 1


def speed(config: TrainConfig, runtime: Runtime, world: World, steps: int) -> dict[str, float]:
    """Median speed of whole steps, GPU time per kind of kernel, peak memory, time to the end of the first step."""
    start = time.perf_counter()
    train_run = TrainRun(config, runtime, world)
    if world.is_main:
        count = f"{world.size} x " if world.size > 1 else ""
        print(
            f"{config.model.n_params():,} parameters on {count}{device_name(world)}, torch {torch.__version__}, "
            f"micro-batch {train_run.runtime.micro_batch_size}, {train_run.runtime.sharding}"
        )
    batch = zipf_tokens(config.model, config.sequences_per_step, world.device)
    train_run.step(0, batch)
    first_step_seconds = time.perf_counter() - start
    times = time_steps(lambda i: train_run.step(i, batch), steps, warmup=2)
    step_ms = statistics.median(times)
    tokens_per_second = config.total_batch_size / step_ms * 1000
    figures = {"tokens/s": tokens_per_second, "step ms": step_ms, "max - min of step ms": max(times) - min(times)}
    utilisation = mfu(config.model, tokens_per_second, device_name(world), world.size)
    if utilisation is not None:
        figures["MFU % (6N + 6LCT)"] = 100 * utilisation
    figures["seconds to the end of the first step"] = first_step_seconds
    if world.size > 1 and train_run.runtime.sharding != "fsdp":
        unsynchronized = time_steps(lambda i: train_run.step(i, batch, sync_gradients=False), steps, warmup=1)
        figures["ms of gradient all-reduce not overlapped"] = step_ms - statistics.median(unsynchronized)
    if world.device.type == "cuda":
        figures["peak memory GiB"] = max(world.all_gather(torch.cuda.max_memory_allocated() / 2**30))
        kernels = profile_kernels(lambda: train_run.step(steps, batch))
        figures |= {f"ms of {kind}": ms for kind, ms in kernels.items()}
    if isinstance(train_run.loss_fn, FusedGPT) and world.is_main:
        engine = train_run.loss_fn.kernels
        print(
            f"products: {engine.linear.name}, attention: {engine.attention.name}, recomputed: {engine.recompute}, "
            f"head: {train_run.loss_fn.head.name}"
        )
    return figures


def print_figures(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 1 else 5
        print(f"  {name:40} {value:>12,.{digits}f}")


if __name__ == "__main__":
    command(main)
