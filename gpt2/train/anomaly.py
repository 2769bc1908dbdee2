"""Detects non-finite values and spikes of the loss and the gradient norm, before the optimizer step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from gpt2.config.train import AnomalyConfig


class Verdict(NamedTuple):
    action: Literal["continue", "warn", "stop", "skip", "rollback"]
    kind: str = ""
    """not finite, loss spike or gradient spike"""
    value: float = 0.0
    z: float | None = None

    def __str__(self) -> str:
        z = "" if self.z is None else f", {self.z:.1f} standard deviations above the window's mean"
        return f"{self.kind}: {self.value:g}{z}"


def z_score(window: Sequence[float]) -> float:
    """Standard deviations of the last value above the mean of the window, which includes it (llm.c's
    outlier_detector.h). At most (n - 1) / sqrt(n) in a window of n, so 11.2 for 128."""
    mean = math.fsum(window) / len(window)
    variance = math.fsum((value - mean) ** 2 for value in window) / len(window)
    return 0.0 if variance == 0.0 else (window[-1] - mean) / math.sqrt(variance)


class AnomalyDetector:
    """Checks the loss and gradient norm of each step against a window of steps.

    Spikes are detected once the window is full. With on_spike "skip", loss_z and grad_z are llm.c's options -sl and
    -sg.

    Args:
        keep: number of finite losses and gradient norms to remember, at least a window.
    """

    def __init__(self, config: AnomalyConfig, keep: int = 0) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=max(keep, config.window))
        self.grad_norms: deque[float] = deque(maxlen=max(keep, config.window))

    def restore(self, losses: Sequence[float], grad_norms: Sequence[float]) -> None:
        """Replace the remembered values by those of a checkpoint."""
        for values, saved in ((self.losses, losses), (self.grad_norms, grad_norms)):
            values.clear()
            values.extend(saved)

    def check(self, loss: float, grad_norm: float) -> Verdict:
        """Check one step; remembers its values if both are finite."""
        for value in (loss, grad_norm):
            if not math.isfinite(value):
                return Verdict(self.config.on_nonfinite, "not finite", value)
        full = len(self.losses) >= self.config.window
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        if full and self.config.on_spike != "ignore":
            for kind, value, window, limit in (
                ("loss spike", loss, self.losses, self.config.loss_z),
                ("gradient spike", grad_norm, self.grad_norms, self.config.grad_z),
            ):
                if (z := z_score(tuple(window)[-self.config.window :])) > limit:
                    return Verdict(self.config.on_spike, kind, value, z)
        return Verdict("continue")
