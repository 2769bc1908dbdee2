"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from gpt2.config.train import OptimConfig


def learning_rate(config: OptimConfig, max_steps: int, step: int) -> float:
    """Learning rate of step 0..max_steps-1.

    Linear warm-up, max_lr * (step + 1) / warmup_steps, while step < warmup_steps. Then "cosine" decays from max_lr to
    min_lr over the remaining steps (llm.c, schedulers.h); "wsd" (warm-up, stable, decay: arXiv:2405.18392) stays at
    max_lr and decays linearly over the last `decay_fraction` of all steps.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (max_steps - config.warmup_steps)
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay_steps = min(config.decay_fraction * max_steps, max_steps - config.warmup_steps)
        share = min(1.0, (max_steps - step) / decay_steps) if decay_steps else 1.0
    return config.min_lr + share * (config.max_lr - config.min_lr)


def parameter_groups(parameters: Iterable[nn.Parameter], config: OptimConfig) -> list[dict[str, object]]:
    """Weight decay on tensors of two or more dimensions, embeddings included; not on biases and LayerNorm."""
    everything = list(parameters)
    groups: list[dict[str, object]] = [
        {"params": [p for p in everything if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in everything if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101).

    Allocates the optimizer state eagerly: an OOM shows at start-up, and all checkpoints hold the same tensors.
    """
    groups = parameter_groups(parameters, config)
    if not groups:  # with more ranks than tensors a rank may own no parameter
        groups = [{"params": [nn.Parameter(torch.zeros(0))]}]
    optimizer = torch.optim.AdamW(groups, lr=config.max_lr, betas=config.betas, eps=config.eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # fused AdamW needs this device
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer
