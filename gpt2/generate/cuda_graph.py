"""Sampling on a GPU without waiting for the host: one step, including the choice of the token, as a CUDA graph.

Launching a step's many small kernels takes longer than running them, and so does passing the token to the host and back
as the next input. Here one launch replays a whole step, the step feeds itself, and the next step already runs while the
host reads the current token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt2.kernels.decode import FusedDecoder, is_supported
from gpt2.model.kv_cache import CachedDecoder

SampleFn = Callable[[Tensor, Tensor], Tensor]
"""logits (R, V), uniforms (R,) -> token ids (R,)"""


class CudaGraphSampler:
    """Decodes and samples one token per row with the cache of `decoder`, on its GPU.

    Args:
        sample: chooses the tokens; part of the graph, so it must not synchronize with the device.
        uniforms: (n, R) float64, the random draws of each step.
    """

    def __init__(self, decoder: CachedDecoder, sample: SampleFn, uniforms: Tensor) -> None:
        device = decoder.wte.device
        self.capacity, self.n_steps = decoder.capacity, len(uniforms)
        self._idx = torch.zeros(decoder.rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(decoder.rows, dtype=torch.long, device=device)
        self._step_index = torch.zeros(1, dtype=torch.long, device=device)
        self._uniforms = uniforms.to(device)
        # double buffering: the host reads one while the device writes the other
        pinned = decoder.wte.is_cuda
        self._host_tokens = [torch.zeros(decoder.rows, dtype=torch.long, pin_memory=pinned) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)]
        self._last_launched = -1
        self._sample = sample
        # the graph stores addresses only: these references keep the memory allocated
        self._decoder, self._fused = decoder, FusedDecoder(decoder) if is_supported(decoder) else None
        with torch.no_grad(), torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # libraries create handles and workspaces before the capture
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._tokens = self._step()

    def _step(self) -> Tensor:
        """The captured step: decode a token per row, sample the next ones (R,), and make them the next input."""
        if self._fused is not None:
            logits = self._fused.decode(self._idx[:, 0], self._positions)
        else:
            logits = self._decoder.masked_decode(self._idx, self._positions, self.capacity)
        tokens = self._sample(logits, self._uniforms.index_select(0, self._step_index)[0])
        self._idx.copy_(tokens.view(-1, 1))
        self._positions.add_(1).clamp_max_(self.capacity - 1)  # rows that have ended must stay inside the cache
        self._step_index.add_(1).clamp_max_(self.n_steps - 1)
        return tokens

    def next_tokens(self, tokens: Sequence[int], positions: Sequence[int], step: int) -> list[int]:
        """The tokens sampled at `step`, after decoding `tokens` at `positions`, all below the capacity.

        Steps must increase. If the previous call was for the step before, `tokens` must be its result.
        """
        with torch.cuda.device(self._idx.device):
            if self._last_launched < step:  # else it already runs, with the same tokens
                self._idx.copy_(torch.tensor(tokens).view(-1, 1))
                self._positions.copy_(torch.tensor(positions))
                self._step_index.fill_(step)
                self._launch(step)
            if step + 1 < self.n_steps and max(positions) + 1 < self.capacity:  # else a window is refilled first
                self._launch(step + 1)
        self._events[step % 2].synchronize()
        return self._host_tokens[step % 2].tolist()

    def _launch(self, step: int) -> None:
        self._graph.replay()
        self._host_tokens[step % 2].copy_(self._tokens, non_blocking=True)
        self._events[step % 2].record()
        self._last_launched = step
