"""How fast this machine trains, where a step's time goes, and that the loss is what the plain path gives.

    python -m bench.train --size 124m [--check] [--kernels reference] [--micro-batch-size 64]
    torchrun --standalone --nproc-per-node 8 -m bench.train --size 124m [--sharding zero1] [--beside ONE.json]

Timed are whole optimizer steps of the recipe's total batch, as the training stage takes them, on random tokens that are
as unevenly common as words are (Zipf). `--check` then trains twice over the same real tokens from the same weights, on
the plain path and on the fast one, and compares the losses of every step. With several processes rank 0 speaks, and the
time of summing gradients that the backward pass does not hide is measured by leaving the sum out.
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

from bench.loss_check import Loop, check, zipf_tokens
from gpt2.config.recipe import load
from gpt2.config.runtime import Runtime
from gpt2.config.train import TrainConfig
from gpt2.console import command
from gpt2.distributed import World, destroy_process_group, init_world
from gpt2.flops import mfu
from gpt2.kernels.fused_gpt import FastGPT
from gpt2.machine import keep_compiled
from gpt2.train.build import device_name

LLMC = {"124m": 545_700, "350m": 200_400}
"""tokens/s of llm.c's hand-written CUDA on one H100 80GB at the same batch"""
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
"""kind of work -> what the names of its GPU kernels contain; the first that fits"""
CHECK_TOKENS, CHECK_STEPS, CHECK_LIMIT = 65_536, 200, 0.003


def time_steps(run: Callable[[int], object], steps: int, warmup: int) -> list[float]:
    """Milliseconds of each of `steps` steps, after `warmup` more; on a GPU by the device's own clock."""
    for i in range(warmup):
        run(i)
    if not torch.cuda.is_available():
        times = []
        for i in range(steps):
            begin = time.perf_counter()
            run(warmup + i)
            times.append(1000 * (time.perf_counter() - begin))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for i, event in enumerate(events[1:]):
        run(warmup + i)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def kinds_of_work(run: Callable[[], object]) -> dict[str, float]:
    """GPU milliseconds of one call by kind of work, "other" last; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "other")
        spent[kind] += event.self_device_time_total / 1000
    return spent


def shard_in_store(store: Path) -> Path | None:
    """The first training shard of the largest there is in a store, or None."""
    found = sorted(store.glob("tokenize/*/shards/*_train_000001.bin"), key=lambda path: path.stat().st_size)
    return found[-1] if found else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="124m", help="a recipe of conf/")
    parser.add_argument("--kernels", choices=("auto", "reference"), default="auto")
    parser.add_argument("--compile", action="store_true", help="with --kernels reference: torch.compile it")
    parser.add_argument("--fp8-head", action="store_true", help="with train.fp8_head=true")
    parser.add_argument("--micro-batch-size", type=int, help="sequences; default: as training begins to try them")
    parser.add_argument("--sharding", choices=("auto", "ddp", "zero1", "fsdp"), default="auto")
    parser.add_argument("--beside", type=Path, help="figures of one process (--json), for the scaling efficiency")
    parser.add_argument("--total-batch-size", type=int, help="tokens a step; default: the recipe's")
    parser.add_argument("--steps", type=int, default=10, help="timed steps; 0: none")
    parser.add_argument("--check", action="store_true", help="compare the loss with the plain path over 200 steps")
    parser.add_argument("--check-steps", type=int, default=CHECK_STEPS)
    parser.add_argument("--check-batch-size", type=int, default=CHECK_TOKENS, help="tokens a step in --check")
    parser.add_argument("--floor", action="store_true", help="with --check: the plain path against itself as well")
    parser.add_argument(
        "--tokens", type=Path, help="a token shard (*.bin) of text, for --check; default: one in the store"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    if arguments.check and arguments.tokens is None:
        arguments.tokens = shard_in_store(Runtime().store)
    if arguments.check and arguments.tokens is None:
        parser.error(
            "--check needs --tokens SHARD.bin, a token shard of real text (python -m gpt2.plan tells where yours lie)"
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
        print("warning: torch finds no GPU, so this measures the CPU; nvidia-smi lists the GPUs", file=sys.stderr)
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
        # by the recipe's own schedule: docs/speed.md says what a shorter warm-up does
        short = config.model_copy(update={"total_batch_size": arguments.check_batch_size})
        micro = min(arguments.micro_batch_size or 16, 16, short.sequences_per_step // world.size)
        compared = check(short, runtime, world, arguments.tokens, micro, arguments.check_steps, arguments.floor)
        show(compared)
        figures |= compared
        passed = abs(compared["mean difference"]) < CHECK_LIMIT and abs(compared["mean of quarter 4"]) < CHECK_LIMIT
        if world.is_main:
            moved = f"the loss curve moved by more than {CHECK_LIMIT} nats"
            print("the loss curve is the plain path's" if passed else moved)
    if arguments.json and world.is_main:
        arguments.json.write_text(json.dumps(figures, indent=2))
    destroy_process_group()
    return 0 if passed else 1


def speed(config: TrainConfig, runtime: Runtime, world: World, steps: int) -> dict[str, float]:
    """Median speed of whole steps, the time by kind of work of one, memory, and the time until the first step ended."""
    begin = time.perf_counter()
    loop = Loop(config, runtime, world)
    if world.is_main:
        several = f"{world.size} x " if world.size > 1 else ""
        print(
            f"{config.model.n_params():,} parameters on {several}{device_name(world)}, torch {torch.__version__}, "
            f"micro-batch {loop.runtime.micro_batch_size}, {loop.runtime.sharding}"
        )
    batch = zipf_tokens(config.model, config.sequences_per_step, world.device)
    loop.step(0, batch)
    first = time.perf_counter() - begin
    times = time_steps(lambda i: loop.step(i, batch), steps, warmup=2)
    step_ms = statistics.median(times)
    tokens_per_second = config.total_batch_size / step_ms * 1000
    figures = {"tokens/s": tokens_per_second, "step ms": step_ms, "spread of step ms": max(times) - min(times)}
    utilisation = mfu(config.model, tokens_per_second, device_name(world), world.size)
    if utilisation is not None:
        figures["MFU % (6N + 6LCT)"] = 100 * utilisation
    figures["seconds to the end of the first step"] = first
    if world.size > 1 and loop.runtime.sharding != "fsdp":
        without = time_steps(lambda i: loop.step(i, batch, summed=False), steps, warmup=1)
        figures["ms of summing gradients not hidden"] = step_ms - statistics.median(without)
    if world.device.type == "cuda":
        figures["peak memory GiB"] = max(world.all_gather(torch.cuda.max_memory_allocated() / 2**30))
        work = kinds_of_work(lambda: loop.step(steps, batch))
        figures |= {f"ms of {kind}": ms for kind, ms in work.items()}
    if isinstance(loop.loss, FastGPT) and world.is_main:
        engine = loop.loss.engine
        print(
            f"products: {engine.linear.name}, attention: {engine.attention.name}, recomputed: {engine.recompute}, "
            f"head: {loop.loss.head.name}"
        )
    return figures


def print_figures(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 1 else 5
        print(f"  {name:40} {value:>12,.{digits}f}")


if __name__ == "__main__":
    command(main)
