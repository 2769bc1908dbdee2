"""How a run is laid out on the memory there is: sharding, recomputation and micro-batch, with the arithmetic shown.

The estimate decides what is tried first; on a GPU a trial step then decides what fits. With fsdp the estimate has to
do: a process that runs out of memory alone would leave the others waiting.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig, TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.kernels.block import Recompute
from gpt2.kernels.fused_gpt import activation_bytes
from gpt2.kernels.head import Fp8Head, Head, eight_bit_obstacle
from gpt2.train.data_parallel import LossFn, Parallel

Sharding = Literal["ddp", "zero1", "fsdp"]
GB = 1e9
PLENTY = 1e18
RESERVE = 0.08
"""share of a GPU's memory that is left to the allocator's gaps, NCCL's buffers and the CUDA context"""
WORTHWHILE_TOKENS = 4096
"""a micro-batch of fewer leaves a GPU waiting for its memory; a layout that allows no more is not the first choice"""
MOST_TOKENS = {"cuda": 131_072, "cpu": 2048}
"""past so many tokens a micro-batch is not tried: on an H100, 128 x 1024 gave 2 % over 64 x 1024 at 124M, and what is
left to gain halves each time; on a CPU, caches overflow"""

# Bytes that the backward pass needs of the forward, a token. In bf16 a block keeps, in widths C: the residual stream
# before both LayerNorms (fp32, 4 + 4), both normalised (2 + 2), q, k, v (6), the attention's result (2), the wide layer
# before and after GELU (8 + 8), and about 4 of the rest. In fp32 all of it is 4 bytes a value.
BLOCK_BYTES = {"bf16": 40, "fp32": 72}
RESIDUAL_BYTES = 4
# A logit: bf16, its fp32 copy, and the gradients of both; fp32 alone has two of them fewer.
LOGIT_BYTES = {"bf16": 12, "fp32": 8}


class Layout(NamedTuple):
    """One way of laying out a run, and what it needs of each GPU, in bytes."""

    sharding: Sharding
    recompute: bool
    fixed: float
    """weights, gradients, moments"""
    a_sequence: float
    """of the micro-batch"""

    def fits(self, available: float) -> int:
        """Sequences of a micro-batch that `available` bytes allow."""
        return max(0, int((available - self.fixed) / self.a_sequence))

    def __str__(self) -> str:
        return self.sharding + (" with recomputed blocks" if self.recompute else "")


def layout(
    model: ModelConfig,
    precision: str,
    size: int,
    sharding: Sharding,
    recompute: bool,
    *,
    head: type[Head] | None = None,
) -> Layout:
    """Estimate the memory of one layout: with fused kernels if `head` is given, else without.

    fp32 weights and gradients take 4 bytes per parameter each, AdamW's moments 8, bf16 copies of the weights 2: 18 in
    total. zero1 divides the moments by the number of processes; fsdp divides everything except gathered weights.
    """
    n, C, V, T = model.n_params(), model.n_embd, model.padded_vocab_size, model.block_size
    copies = 2 if precision == "bf16" else 0
    if sharding == "fsdp":
        gathered = (V + T) * C + 2 * 12 * C * C  # embeddings, this block and the next
        fixed = n * 16 / size + gathered * ((copies or 4) + 4)  # their weights and gradients
    elif sharding == "zero1":
        fixed = n * (8 + copies + 8 / size)
    else:
        fixed = n * (16 + copies)
    if head is not None and sharding != "fsdp":
        level: Recompute = "block" if recompute else "none"
        fixed += head.bytes_a_weight * V * C
        return Layout(sharding, recompute, fixed, activation_bytes(model, T, level, head.bytes_a_logit))
    kept = BLOCK_BYTES[precision] * C
    blocks = model.n_layer * RESIDUAL_BYTES * C + kept if recompute else model.n_layer * kept
    return Layout(sharding, recompute, fixed, T * (blocks + V * LOGIT_BYTES[precision]))


def choose(config: TrainConfig, runtime: Runtime, world: World, free: float | None) -> tuple[Runtime, list[str]]:
    """Settle what `runtime` leaves to "auto": precision, compile, sharding, recomputation and the micro-batch.

    Args:
        free: bytes that the fullest GPU of the run has left; None on a CPU, where memory is not looked at.

    Returns:
        The runtime with nothing of these left open, and lines that say how that came about.

    Raises:
        UserError: more processes than sequences in a step, or nothing fits.
    """
    on_gpu = world.device.type == "cuda"
    sequences = config.sequences_per_step
    if world.size > sequences:
        raise UserError(
            f"{world.size} processes share {sequences} sequences a step ({config.total_batch_size:,} tokens of "
            f"{config.model.block_size:,}): use at most {sequences}, or raise train.total_batch_size"
        )
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    available = PLENTY if free is None else free * (1 - RESERVE)
    each = -(-sequences // world.size)

    head = None  # of the fused kernels
    if on_gpu and precision == "bf16" and runtime.kernels == "auto":
        in_8_bits = config.fp8_head and eight_bit_obstacle(config.model, world.device) is None
        head = Fp8Head if in_8_bits else Head
    ways = [layout(config.model, precision, world.size, *way, head=head) for way in _ways(runtime, world)]
    wanted = min(each, -(-WORTHWHILE_TOKENS // config.model.block_size))
    if runtime.micro_batch_size != "auto":
        wanted = min(each, runtime.micro_batch_size)
    best = next((way for way in ways if way.fits(available) >= wanted), None)
    best = best or max(ways, key=lambda way: way.fits(available))
    room = each if free is None else min(each, best.fits(available))
    if room < 1:
        raise UserError(
            f"{best} needs {best.fixed / GB:.1f} GB for weights, gradients and moments and "
            f"{best.a_sequence / GB:.2f} GB for a sequence of {config.model.block_size:,} tokens; "
            f"{available / GB:.1f} GB of each GPU can be used: {_way_out(runtime, world)}"
        )
    micro = runtime.micro_batch_size
    if micro == "auto":
        micro = candidates(each, most_sequences(config.model, world, room, tried=best.sharding != "fsdp"))[0]
    settled = runtime.model_copy(
        update={
            "precision": precision,
            "compile": on_gpu if runtime.compile == "auto" else runtime.compile,
            "sharding": best.sharding,
            "activation_checkpointing": best.recompute,
            "micro_batch_size": min(micro, each),
        }
    )
    lines = [] if free is None else _explain(config, best, ways, world, free, room)
    if sequences % (world.size * min(micro, each)):
        lines.append(
            f"{sequences} sequences a step do not divide into {world.size} x {min(micro, each)}: "
            f"some micro-batches are smaller, which is slower and changes nothing else"
        )
    return settled, lines


def most_sequences(model: ModelConfig, world: World, room: int, *, tried: bool) -> int:
    """Sequences beyond which a micro-batch is not chosen. The estimate may be too high by half; where it is `tried`
    before training starts, that will tell."""
    return max(1, min(MOST_TOKENS[world.device.type] // model.block_size, room + room // 2 if tried else room))


def _ways(runtime: Runtime, world: World) -> Iterator[tuple[Sharding, bool]]:
    """From the fastest to the leanest: dealing out the moments costs next to nothing, recomputing a third of the
    arithmetic, and fsdp goes without the fused kernels."""
    for sharding, recompute in (
        ("ddp", False), ("zero1", False), ("ddp", True), ("zero1", True), ("fsdp", False), ("fsdp", True),
    ):  # fmt: skip
        alone = world.size == 1 and sharding != "ddp"  # nobody to share with
        if runtime.sharding not in ("auto", sharding) or (alone and runtime.sharding == "auto"):
            continue
        if runtime.activation_checkpointing not in ("auto", recompute):
            continue
        yield sharding, recompute  # type: ignore[misc]


def _way_out(runtime: Runtime, world: World) -> str:
    advice = []
    if runtime.activation_checkpointing is False:
        advice.append("set runtime.activation_checkpointing=true")
    if runtime.sharding not in ("auto", "fsdp"):
        advice.append("set runtime.sharding=fsdp")
    advice.append("use more GPUs" if world.size > 1 or runtime.sharding == "auto" else "use several GPUs")
    return ", or ".join(advice)


def _explain(
    config: TrainConfig, best: Layout, ways: Sequence[Layout], world: World, free: float, room: int
) -> list[str]:
    usable = free * (1 - RESERVE) / GB
    lines = [
        f"memory: {free / GB:.1f} GB free on each GPU, {usable:.1f} GB of it to be used; "
        f"{config.model.n_params():,} parameters, {world.size} process{'es' if world.size > 1 else ''}"
    ]
    for way in ways:
        chosen = " <- chosen" if way is best else ""
        lines.append(
            f"memory: {way}: {way.fixed / GB:.1f} GB fixed + {way.a_sequence / GB:.2f} GB a sequence: "
            f"room for {way.fits(usable * GB)} sequences{chosen}"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------- trials


def candidates(sequences: int, most: int) -> list[int]:
    """Micro-batches worth trying, the largest first: divisors of a process's sequences, up to `most`."""
    return [n for n in range(min(sequences, most), 0, -1) if sequences % n == 0]


def settle_micro_batch(
    config: TrainConfig, runtime: Runtime, asked: Runtime, world: World, parallel: Parallel, loss_fn: LossFn
) -> Runtime:
    """On a GPU, try what was only estimated: the largest micro-batch whose forward and backward pass go through.

    Args:
        runtime: what `choose` made of `asked`.

    Returns:
        The runtime with that micro-batch. Every process must call it.
    """
    if asked.micro_batch_size != "auto" or world.device.type != "cuda" or runtime.sharding == "fsdp":
        return runtime  # fsdp: a process that runs out of memory alone would leave the others waiting
    assert runtime.micro_batch_size != "auto"

    def attempt(micro: int) -> None:
        tokens = torch.randint(config.model.vocab_size, (micro, config.model.block_size), device=world.device)
        try:
            parallel.backward(loss_fn(tokens, tokens), last=False)
        finally:
            parallel.clear()

    tried = candidates(-(-config.sequences_per_step // world.size), runtime.micro_batch_size)
    micro = largest_that_fits(tried, attempt, world)
    if world.is_main:
        print(f"memory: micro-batch of {micro} x {config.model.block_size:,} tokens", flush=True)
    return runtime.model_copy(update={"micro_batch_size": micro})


def largest_that_fits(micro_batch_sizes: Sequence[int], attempt: Callable[[int], Any], world: World) -> int:
    """The first micro-batch for which a trial step goes through on every process.

    Raises:
        UserError: not even the last does.
    """
    for micro in micro_batch_sizes:
        if all(world.all_gather(float(_goes_through(attempt, micro)))):
            return micro
        if world.is_main:
            print(f"memory: a micro-batch of {micro} does not fit", flush=True)
    raise UserError(
        f"out of GPU memory with a micro-batch of {micro_batch_sizes[-1]}: set runtime.activation_checkpointing=true, "
        f"or runtime.sharding=fsdp on several GPUs"
    )


def _goes_through(attempt: Callable[[int], Any], micro: int) -> bool:
    try:
        attempt(micro)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    gc.collect()  # outside the handler: the exception's frames hold the tensors
    torch.cuda.empty_cache()
    return fits


def explain_out_of_memory(error: torch.OutOfMemoryError, runtime: Runtime) -> UserError:
    """What to change, after a run that was under way ran out of memory."""
    micro = runtime.micro_batch_size
    smaller = f"runtime.micro_batch_size={max(1, micro // 2)}" if micro != "auto" else "a smaller micro-batch"
    ways = [smaller] if micro != 1 else []
    if runtime.activation_checkpointing is not True:
        ways.append("runtime.activation_checkpointing=true")
    if runtime.sharding != "fsdp":
        ways.append("runtime.sharding=fsdp on several GPUs")
    first = str(error).split(". ")
    return UserError(
        f"out of GPU memory with micro-batches of {micro} ({'; '.join(first[:2])}): set {', or '.join(ways)}; "
        f"run again, the last checkpoint is kept"
    )


def free_bytes(world: World) -> float | None:
    """Bytes that the fullest GPU of the run has left; None on a CPU. Every process must call it."""
    if world.device.type != "cuda":
        return None
    return min(world.all_gather(float(torch.cuda.mem_get_info(world.device)[0])))
