"""Fits a run into GPU memory: chooses sharding, recomputation and micro-batch, and prints the arithmetic.

The estimate decides what is tried first; on a GPU, trial steps then find the largest micro-batch that fits. With fsdp
the estimate is final: trial steps are collective, and a rank that alone runs out of memory would hang the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from gpt2.config.run import ModelConfig, Runtime, TrainConfig
from gpt2.distributed import World
from gpt2.errors import UserError
from gpt2.kernels.block import Recompute
from gpt2.kernels.fused_gpt import activation_bytes
from gpt2.kernels.head import Fp8Head, Head, eight_bit_obstacle
from gpt2.train.parallel import LossFn, ParallelModel

Sharding = Literal["ddp", "zero1", "fsdp"]
GB = 1e9
UNLIMITED = 1e18
RESERVE = 0.08
"""fraction of a GPU's memory left for fragmentation, NCCL buffers and the CUDA context"""
MIN_EFFICIENT_TOKENS = 4096
"""smaller micro-batches are memory-bound; a layout without room for this many tokens is not preferred"""
MAX_TOKENS = {"cuda": 131_072, "cpu": 2048}
"""larger micro-batches are not tried. On an H100, 128 x 1024 is 2 % faster than 64 x 1024 at 124M, and the gain halves
with each doubling; on a CPU the caches overflow"""

# Bytes per token that the backward pass needs of the forward pass. In bf16 a block keeps, in multiples of C: the
# residual stream before both LayerNorms (fp32, 4 + 4), both normalized (2 + 2), q, k, v (6), the attention output (2),
# the MLP before and after GELU (8 + 8), and about 4 of the rest. In fp32 all of it is 4 bytes per value.
BLOCK_BYTES = {"bf16": 40, "fp32": 72}
RESIDUAL_BYTES = 4
# Per logit: bf16, its fp32 copy, and the gradients of both; in fp32 two of them are not needed.
LOGIT_BYTES = {"bf16": 12, "fp32": 8}


class MemoryEstimate(NamedTuple):
    """Memory of one layout on each GPU, in bytes."""

    sharding: Sharding
    recompute: bool
    fixed_bytes: float
    """weights, gradients, optimizer state"""
    bytes_per_sequence: float
    """of the micro-batch"""

    def max_sequences(self, available: float) -> int:
        """The largest micro-batch that fits into `available` bytes."""
        return max(0, int((available - self.fixed_bytes) / self.bytes_per_sequence))

    def __str__(self) -> str:
        return self.sharding + (" with recomputation" if self.recompute else "")


def estimate_memory(
    model: ModelConfig,
    precision: str,
    size: int,
    sharding: Sharding,
    recompute: bool,
    *,
    head: type[Head] | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one layout: with fused kernels if `head` is given, else without.

    fp32 weights and gradients take 4 bytes per parameter each, AdamW's moments 8, bf16 copies of the weights 2: 18 in
    total. zero1 divides the moments by the number of ranks; fsdp divides everything except gathered weights.
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
        return MemoryEstimate(sharding, recompute, fixed, activation_bytes(model, T, level, head.bytes_a_logit))
    kept = BLOCK_BYTES[precision] * C
    blocks = model.n_layer * RESIDUAL_BYTES * C + kept if recompute else model.n_layer * kept
    return MemoryEstimate(sharding, recompute, fixed, T * (blocks + V * LOGIT_BYTES[precision]))


def resolve_runtime(
    config: TrainConfig, runtime: Runtime, world: World, free: float | None
) -> tuple[Runtime, list[str]]:
    """Replace "auto" in `runtime`: precision, compile, sharding, activation checkpointing and micro-batch size.

    Args:
        free: free bytes on the fullest GPU of the run; None on a CPU, where memory is not checked.

    Returns:
        The runtime without "auto" in these fields, and lines that show the arithmetic.

    Raises:
        UserError: more ranks than sequences per step, or no layout fits.
    """
    on_gpu = world.device.type == "cuda"
    sequences = config.sequences_per_step
    if world.size > sequences:
        raise UserError(
            f"{world.size} processes share {sequences} sequences per step ({config.total_batch_size:,} tokens of "
            f"{config.model.block_size:,}): use at most {sequences}, or raise train.total_batch_size"
        )
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    available = UNLIMITED if free is None else free * (1 - RESERVE)
    sequences_per_rank = -(-sequences // world.size)

    head = None  # of the fused kernels
    if on_gpu and precision == "bf16" and runtime.kernels == "auto":
        in_8_bits = config.fp8_head and eight_bit_obstacle(config.model, world.device) is None
        head = Fp8Head if in_8_bits else Head
    estimates = [
        estimate_memory(config.model, precision, world.size, *layout, head=head) for layout in _layouts(runtime, world)
    ]
    target = -(-MIN_EFFICIENT_TOKENS // config.model.block_size)
    if runtime.micro_batch_size != "auto":
        target = runtime.micro_batch_size
    target = min(sequences_per_rank, target)
    best = next((estimate for estimate in estimates if estimate.max_sequences(available) >= target), None)
    best = best or max(estimates, key=lambda estimate: estimate.max_sequences(available))
    fits = sequences_per_rank if free is None else min(sequences_per_rank, best.max_sequences(available))
    if fits < 1:
        raise UserError(
            f"{best} needs {best.fixed_bytes / GB:.1f} GB for weights, gradients and optimizer state and "
            f"{best.bytes_per_sequence / GB:.2f} GB per sequence of {config.model.block_size:,} tokens; "
            f"{available / GB:.1f} GB of each GPU are usable: {_advice(runtime, world)}"
        )
    if runtime.micro_batch_size == "auto":
        limit = max_micro_batch(config.model, world, fits, tuned=best.sharding != "fsdp")
        micro_batch_size = candidates(sequences_per_rank, limit)[0]
    else:
        micro_batch_size = min(runtime.micro_batch_size, sequences_per_rank)
    resolved = runtime.model_copy(
        update={
            "precision": precision,
            "compile": on_gpu if runtime.compile == "auto" else runtime.compile,
            "sharding": best.sharding,
            "activation_checkpointing": best.recompute,
            "micro_batch_size": micro_batch_size,
        }
    )
    lines = [] if free is None else _describe(config, best, estimates, world, free)
    if sequences % (world.size * micro_batch_size):
        lines.append(
            f"{sequences} sequences per step are not divisible by {world.size} x {micro_batch_size}: some "
            f"micro-batches are smaller, which is slower; results are the same"
        )
    return resolved, lines


def max_micro_batch(model: ModelConfig, world: World, fits: int, *, tuned: bool) -> int:
    """The largest micro-batch to consider: half above the estimate where `tune_micro_batch` can correct it."""
    return max(1, min(MAX_TOKENS[world.device.type] // model.block_size, fits + fits // 2 if tuned else fits))


def _layouts(runtime: Runtime, world: World) -> Iterator[tuple[Sharding, bool]]:
    """(sharding, recompute), fastest first: zero1 is nearly free, recomputation costs a third of the arithmetic, and
    fsdp cannot use the fused kernels."""
    for sharding, recompute in (
        ("ddp", False), ("zero1", False), ("ddp", True), ("zero1", True), ("fsdp", False), ("fsdp", True),
    ):  # fmt: skip
        useless = world.size == 1 and sharding != "ddp"
        if runtime.sharding not in ("auto", sharding) or (useless and runtime.sharding == "auto"):
            continue
        if runtime.activation_checkpointing not in ("auto", recompute):
            continue
        yield sharding, recompute  # type: ignore[misc]


def _advice(runtime: Runtime, world: World) -> str:
    advice = []
    if runtime.activation_checkpointing is False:
        advice.append("set runtime.activation_checkpointing=true")
    if runtime.sharding not in ("auto", "fsdp"):
        advice.append("set runtime.sharding=fsdp")
    advice.append("use more GPUs" if world.size > 1 or runtime.sharding == "auto" else "use several GPUs")
    return ", or ".join(advice)


def _describe(
    config: TrainConfig, best: MemoryEstimate, estimates: Sequence[MemoryEstimate], world: World, free: float
) -> list[str]:
    available = free * (1 - RESERVE)
    lines = [
        f"memory: {free / GB:.1f} GB free on each GPU, {available / GB:.1f} GB usable; "
        f"{config.model.n_params():,} parameters, {world.size} process{'es' if world.size > 1 else ''}"
    ]
    for estimate in estimates:
        chosen = " <- chosen" if estimate is best else ""
        lines.append(
            f"memory: {estimate}: {estimate.fixed_bytes / GB:.1f} GB fixed + "
            f"{estimate.bytes_per_sequence / GB:.2f} GB per sequence: "
            f"room for {estimate.max_sequences(available)} sequences{chosen}"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------- trials


def candidates(sequences: int, limit: int) -> list[int]:
    """Micro-batch sizes to try, largest first: divisors of a rank's sequences, up to `limit`."""
    return [n for n in range(min(sequences, limit), 0, -1) if sequences % n == 0]


def tune_micro_batch(
    config: TrainConfig, runtime: Runtime, requested: Runtime, world: World, parallel: ParallelModel, loss_fn: LossFn
) -> Runtime:
    """On a GPU, find the largest micro-batch whose forward and backward pass fit into memory. Collective.

    Args:
        runtime: `requested` after `resolve_runtime`.

    Raises:
        UserError: no micro-batch fits.
    """
    if requested.micro_batch_size != "auto" or world.device.type != "cuda" or runtime.sharding == "fsdp":
        return runtime
    assert runtime.micro_batch_size != "auto"

    def attempt(micro_batch_size: int) -> None:
        tokens = torch.randint(
            config.model.vocab_size, (micro_batch_size, config.model.block_size), device=world.device
        )
        try:
            parallel.backward(loss_fn(tokens, tokens), sync_gradients=False)
        finally:
            parallel.zero_grad()

    sizes = candidates(-(-config.sequences_per_step // world.size), runtime.micro_batch_size)
    micro_batch_size = find_largest(sizes, attempt, world)
    if world.is_main:
        print(f"memory: micro-batch of {micro_batch_size} x {config.model.block_size:,} tokens", flush=True)
    return runtime.model_copy(update={"micro_batch_size": micro_batch_size})


def find_largest(sizes: Sequence[int], attempt: Callable[[int], Any], world: World) -> int:
    """The first micro-batch size whose trial step fits on every rank.

    Raises:
        UserError: none fits.
    """
    for size in sizes:
        if all(world.all_gather(float(_fits(attempt, size)))):
            return size
        if world.is_main:
            print(f"memory: a micro-batch of {size} does not fit", flush=True)
    raise UserError(
        f"out of GPU memory with a micro-batch of {sizes[-1]}: set runtime.activation_checkpointing=true, "
        f"or runtime.sharding=fsdp on several GPUs"
    )


def _fits(attempt: Callable[[int], Any], size: int) -> bool:
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    gc.collect()  # outside the handler: the exception's frames hold the tensors
    torch.cuda.empty_cache()
    return fits


def explain_out_of_memory(error: torch.OutOfMemoryError, runtime: Runtime) -> UserError:
    """The message after an OOM during training: which settings to change."""
    micro = runtime.micro_batch_size
    smaller = f"runtime.micro_batch_size={max(1, micro // 2)}" if micro != "auto" else "a smaller micro-batch"
    changes = [smaller] if micro != 1 else []
    if runtime.activation_checkpointing is not True:
        changes.append("runtime.activation_checkpointing=true")
    if runtime.sharding != "fsdp":
        changes.append("runtime.sharding=fsdp on several GPUs")
    sentences = str(error).split(". ")
    return UserError(
        f"out of GPU memory with micro-batches of {micro} ({'; '.join(sentences[:2])}): set {', or '.join(changes)}; "
        f"run again, the last checkpoint is kept"
    )


def free_bytes(world: World) -> float | None:
    """Free bytes on the fullest GPU of the run; None on a CPU. Collective."""
    if world.device.type != "cuda":
        return None
    return min(world.all_gather(float(torch.cuda.mem_get_info(world.device)[0])))
