"""Sampling on a GPU without waiting for the host: one step, the choice of its token included, recorded as a CUDA graph.

Launching the many small kernels of a step takes longer than running them, and then asking for the token, making the
next step's input of it and sending that takes as long again. Here a step is launched at once and feeds itself, and
while the host looks at one token the next is already under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt2.kernels.decode import FewRows, fits
from gpt2.model.kv_cache import CachedReader

Choose = Callable[[Tensor, Tensor], Tensor]
"""logits (R, V), u (R,) -> token ids (R,)"""


class RecordedSteps:
    """Steps of one token a row over the cache of `reader`, on its GPU.

    Args:
        choose: how a token is chosen; recorded too, so it must not ask the device for anything.
        dice: (n, R) float64, what `choose` gets at each turn.
    """

    def __init__(self, reader: CachedReader, choose: Choose, dice: Tensor) -> None:
        device = reader.wte.device
        self.capacity, self.turns = reader.capacity, len(dice)
        self._idx = torch.zeros(reader.rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(reader.rows, dtype=torch.long, device=device)
        self._turn = torch.zeros(1, dtype=torch.long, device=device)
        self._dice = dice.to(device)
        # two, because one is read here while the next is written there
        self._told = [torch.zeros(reader.rows, dtype=torch.long, pin_memory=reader.wte.is_cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)]
        self._launched = -1  # the last turn that was
        self._choose = choose
        # the graph knows memory by its address alone: whoever owns it has to live as long
        self._reader, self._few = reader, FewRows(reader) if fits(reader) else None
        with torch.no_grad(), torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # libraries set up their handles and workspaces before the recording
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._chosen = self._step()

    def _step(self) -> Tensor:
        """What is recorded: read a token a row, choose the next, and be ready for another time; the choice (R,)."""
        if self._few is not None:
            logits = self._few.step(self._idx[:, 0], self._positions)
        else:
            logits = self._reader.masked_step(self._idx, self._positions, self.capacity)
        chosen = self._choose(logits, self._dice.index_select(0, self._turn)[0])
        self._idx.copy_(chosen.view(-1, 1))
        self._positions.add_(1).clamp_max_(self.capacity - 1)  # of a row that has ended: it must stay inside
        self._turn.add_(1).clamp_max_(self.turns - 1)
        return chosen

    def after(self, tokens: Sequence[int], positions: Sequence[int], turn: int) -> list[int]:
        """The tokens chosen at `turn`, after reading `tokens` at `positions`, all below the capacity.

        Turns only go up. If the turn before was asked for here, `tokens` are what it returned.
        """
        with torch.cuda.device(self._idx.device):
            if self._launched < turn:  # else it is under way already, from the same tokens
                self._idx.copy_(torch.tensor(tokens).view(-1, 1))
                self._positions.copy_(torch.tensor(positions))
                self._turn.fill_(turn)
                self._launch(turn)
            if turn + 1 < self.turns and max(positions) + 1 < self.capacity:  # else it will begin with a window anew
                self._launch(turn + 1)
        self._events[turn % 2].synchronize()
        return self._told[turn % 2].tolist()

    def _launch(self, turn: int) -> None:
        self._graph.replay()
        self._told[turn % 2].copy_(self._chosen, non_blocking=True)
        self._events[turn % 2].record()
        self._launched = turn
