"""How fast this machine trains, where a step's time goes, and that the loss is what the plain path gives.

    python -m gpt2.bench_train --size 124m [--check] [--kernels reference] [--micro-batch-size 64]

Timed are whole optimizer steps of the recipe's total batch, as the training stage takes them, on random tokens that are
as unevenly common as words are (Zipf). `--check` then trains twice over the same real tokens from the same weights, on
the plain path and on the fast one, and compares the losses of every step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gpt2.config import ModelConfig, Runtime, TrainConfig
from gpt2.distributed import SOLO, World
from gpt2.errors import UserError
from gpt2.fast import FastGPT, accelerate, activation_bytes
from gpt2.flops import mfu
from gpt2.model import GPT
from gpt2.optim import learning_rate
from gpt2.parallel import Replicas
from gpt2.recipe import load
from gpt2.shards import open_shard

Batch = tuple[Tensor, Tensor]
LLMC = {"124m": 545_700, "350m": 200_400}
"""tokens/s of llm.c's hand-written CUDA on one H100 80GB at the same batch"""
KINDS = {
    "attention": ("sdpa", "flash", "fmha", "cudnn"),
    "LayerNorm": ("layer_norm",),
    "bias gradients": ("row_sum",),
    "GELU": ("gelu",),
    "cross-entropy": ("cross_entropy", "log_softmax", "nll_loss"),
    "embeddings": ("embedding", "index"),
    "optimizer and gradient norm": ("adam", "norm", "multi_tensor"),
    "matrix products": ("nvjet", "gemm", "cutlass", "xmma", "splitk", "cublas"),
}
"""kind of work -> what the names of its GPU kernels contain; the first that fits"""
CHECK_TOKENS, CHECK_STEPS, CHECK_LIMIT = 65_536, 200, 0.003


def zipf_tokens(config: ModelConfig, sequences: int, device: torch.device, seed: int = 0) -> Batch:
    """Random (idx, targets), each (sequences, block_size), with the r-th commonest token as likely as 1 / r."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = 1.0 / torch.arange(1, config.vocab_size + 1, device=device)
    shape = (sequences, config.block_size + 1)
    tokens = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator).view(shape)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Loop:
    """The training stage's step, over one set of weights on one device."""

    def __init__(self, config: TrainConfig, runtime: Runtime, device: torch.device, micro_batch_size: int) -> None:
        self.config, self.micro_batch_size = config, micro_batch_size
        model = GPT(config.model)
        model.init_weights(config.seed)
        model.to(device)
        self.loss: nn.Module = accelerate(model, runtime, device)
        self.parallel = Replicas(model, config.optim, World(0, 0, 1, device) if device.type == "cuda" else SOLO)

    def step(self, step: int, batch: Batch) -> Tensor:
        """One optimizer step over a whole batch (sequences, T); its mean loss, on the device."""
        parts = list(zip(*(part.split(self.micro_batch_size) for part in batch), strict=True))
        total = torch.zeros((), device=batch[0].device)
        for i, (idx, targets) in enumerate(parts):
            loss = self.loss(idx, targets) / len(parts)
            self.parallel.backward(loss, last=i == len(parts) - 1)
            total += loss.detach()
        self.parallel.clip(self.config.optim.grad_clip)
        self.parallel.step(learning_rate(self.config.optim, self.config.max_steps, step))
        self.parallel.clear()
        return total


def time_steps(run: Callable[[int], Tensor], steps: int, warmup: int) -> list[float]:
    """Milliseconds of each of `steps` steps, after `warmup` more. On a GPU the steps are queued without waiting, as in
    training, and each is timed by the device's own clock."""
    for i in range(warmup):
        run(i).item()
    if not torch.cuda.is_available():
        times = []
        for i in range(steps):
            begin = time.perf_counter()
            run(warmup + i).item()
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


def micro_batch_that_fits(config: TrainConfig, device: torch.device) -> int:
    """The largest power of two of sequences, at most 128, that fits beside the weights and AdamW's state."""
    if device.type != "cuda":
        return 1
    free = torch.cuda.mem_get_info(device)[0] - 18 * config.model.n_params() - (2 << 30)
    block = config.model.block_size
    sizes = [2**i for i in range(7, -1, -1) if config.sequences_per_step % 2**i == 0]
    return next((size for size in sizes if activation_bytes(config.model, size * block) < free), 1)


def real_batches(path: Path, config: ModelConfig, sequences: int, device: torch.device) -> Iterator[Batch]:
    """Batches (sequences, T) in file order out of a token shard, from the start again when it ends."""
    tokens = torch.from_numpy(open_shard(path).astype("int64"))
    span = sequences * config.block_size
    if len(tokens) <= span:
        raise UserError(f"{path} holds {len(tokens):,} tokens, one batch takes {span + 1:,}: give a longer shard")
    while True:
        for start in range(0, len(tokens) - span, span):
            part = tokens[start : start + span + 1].to(device)
            yield part[:-1].view(sequences, -1), part[1:].view(sequences, -1)


def shard_in_store(store: Path) -> Path | None:
    """The first training shard of the largest there is in a store, or None."""
    found = sorted(store.glob("tokenize/*/shards/*_train_000001.bin"), key=lambda path: path.stat().st_size)
    return found[-1] if found else None


def losses_of(
    config: TrainConfig, runtime: Runtime, device: torch.device, path: Path, micro: int, steps: int
) -> list[float]:
    """The losses of the first `steps` steps of a run of `config` over the tokens of `path`."""
    loop = Loop(config, runtime, device, micro)
    batches = real_batches(path, config.model, config.sequences_per_step, device)
    losses = [loop.step(step, next(batches)) for step in range(steps)]
    return torch.stack(losses).tolist()


def check(
    config: TrainConfig, runtime: Runtime, device: torch.device, path: Path, micro: int, steps: int, floor: bool = False
) -> dict[str, float]:
    """Train on the plain path and on `runtime`'s, from the same weights over the same tokens, and compare.

    Args:
        floor: also compare the plain path with itself at half the micro-batch, where nothing but rounding differs: what
            of a difference is to be expected from nothing.

    Returns:
        differences over the steps, in nats: mean, mean of the last quarter, mean and largest without sign.
    """
    plain_runtime = runtime.model_copy(update={"kernels": "reference", "compile": False})
    plain = losses_of(config, plain_runtime, device, path, micro, steps)
    fast = losses_of(config, runtime, device, path, micro, steps)
    figures = {"first plain loss": plain[0], "last plain loss": plain[-1], "last fast loss": fast[-1]}
    figures |= difference(plain, fast, "")
    if floor:
        halved = losses_of(config, plain_runtime, device, path, max(1, micro // 2), steps)
        figures |= difference(plain, halved, "plain against itself: ")
    return figures


def difference(plain: list[float], other: list[float], label: str) -> dict[str, float]:
    signed = [b - a for a, b in zip(plain, other, strict=True)]
    return {
        f"{label}mean difference": statistics.fmean(signed),
        f"{label}mean of the last quarter": statistics.fmean(signed[-max(1, len(signed) // 4) :]),
        f"{label}mean without sign": statistics.fmean(map(abs, signed)),
        f"{label}largest": max(map(abs, signed)),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt2.bench_train", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="124m", help="a recipe of conf/")
    parser.add_argument("--kernels", choices=("auto", "reference"), default="auto")
    parser.add_argument("--compile", action="store_true", help="with --kernels reference: torch.compile it")
    parser.add_argument("--micro-batch-size", type=int, help="sequences; default: the largest that fits, at most 128")
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides = {"train.total_batch_size": arguments.total_batch_size} if arguments.total_batch_size else {}
    config = load(arguments.size, overrides).train
    runtime = Runtime(kernels=arguments.kernels, compile=True if arguments.compile else "auto")
    micro = arguments.micro_batch_size or micro_batch_that_fits(config, device)
    print(f"GPT-2 {arguments.size} on {device_name(device)}, torch {torch.__version__}, micro-batch {micro}")
    figures: dict[str, float] = {}
    if arguments.steps:
        figures = speed(config, runtime, device, micro, arguments.steps)
        if arguments.size in LLMC and device.type == "cuda":
            figures["ratio to llm.c"] = figures["tokens/s"] / LLMC[arguments.size]
        show(figures)
    passed = True
    if arguments.check:
        # by the recipe's own schedule: docs/speed.md says what a shorter warm-up does
        short = config.model_copy(update={"total_batch_size": arguments.check_batch_size})
        micro = min(micro, 16, short.sequences_per_step)
        compared = check(short, runtime, device, arguments.tokens, micro, arguments.check_steps, arguments.floor)
        show(compared)
        figures |= compared
        passed = (
            abs(compared["mean difference"]) < CHECK_LIMIT and abs(compared["mean of the last quarter"]) < CHECK_LIMIT
        )
        print(
            "the loss curve is the plain path's" if passed else f"the loss curve moved by more than {CHECK_LIMIT} nats"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))
    return 0 if passed else 1


def speed(config: TrainConfig, runtime: Runtime, device: torch.device, micro: int, steps: int) -> dict[str, float]:
    """Median speed of whole steps, the time by kind of work of one, memory, and the time until the first step ended."""
    begin = time.perf_counter()
    loop = Loop(config, runtime, device, micro)
    batch = zipf_tokens(config.model, config.sequences_per_step, device)
    loop.step(0, batch).item()
    first = time.perf_counter() - begin
    times = time_steps(lambda i: loop.step(i, batch), steps, warmup=2)
    step_ms = statistics.median(times)
    tokens_per_second = config.total_batch_size / step_ms * 1000
    figures = {"tokens/s": tokens_per_second, "step ms": step_ms, "spread of step ms": max(times) - min(times)}
    utilisation = mfu(config.model, tokens_per_second, device_name(device), 1)
    if utilisation is not None:
        figures["MFU % (6N + 6LCT)"] = 100 * utilisation
    figures["seconds to the end of the first step"] = first
    if device.type == "cuda":
        figures["peak memory GiB"] = torch.cuda.max_memory_allocated() / 2**30
        work = kinds_of_work(lambda: loop.step(steps, batch))
        figures |= {f"ms of {kind}": ms for kind, ms in work.items()}
    if isinstance(loop.loss, FastGPT):
        engine = loop.loss.engine
        print(f"products: {engine.linear.name}, attention: {engine.attention.name}, recomputed: {engine.recompute}")
    return figures


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def show(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 1 else 5
        print(f"  {name:40} {value:>12,.{digits}f}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
