"""FLOPs per token, peak FLOP/s of GPUs, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
from typing import Literal

from gpt2.config.train import ModelConfig

Convention = Literal["llm.c", "nanogpt"]

# Dense bf16 matrix products with fp32 accumulation, FLOP/s, from NVIDIA's data sheets (no sparsity).
PEAK_BF16 = {
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "A100 PCIE": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
SAME_CHIP = re.compile(r"NVIDIA|GeForce|SXM\d*|\d+GB|HBM\d\w*")
"""words of a device's name that do not change its peak; all others may (Laptop, Ti, D, MIG)"""


def flops_per_token(config: ModelConfig, convention: Convention = "llm.c") -> float:
    """FLOPs per token of a forward and backward pass: 6 N + 6 L C T by llm.c's formula (attention is causal, so half of
    the scores), 6 N + 12 L C T by that of nanoGPT and PaLM (arXiv:2204.02311, appendix B). N counts every parameter,
    embeddings included, with the real vocabulary of 50,257; llm.c's N has 50,304 rows, 0.027 % more FLOPs for 124M."""
    attention = {"llm.c": 6, "nanogpt": 12}[convention] * config.n_layer * config.n_embd * config.block_size
    return float(6 * config.n_params() + attention)


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the driver's name for it; None if unknown, also for a CPU."""
    words = [word for word in re.split(r"[ -]+", device_name) if not SAME_CHIP.fullmatch(word)]
    return PEAK_BF16.get(" ".join(words))


def mfu(config: ModelConfig, tokens_per_second: float, device_name: str, n_devices: int) -> float | None:
    """MFU by llm.c's convention: the model's FLOP/s divided by the devices' peak; None if the peak is unknown."""
    peak = peak_flops(device_name)
    return None if peak is None else flops_per_token(config) * tokens_per_second / (peak * n_devices)
