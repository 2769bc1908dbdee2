"""Processes that read and encode units, for what threads of one process cannot do side by side.

tiktoken does not scale over threads, and parsing JSON holds the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from gpt2.errors import UserError
from gpt2.shards import TOKEN
from gpt2.stage.facts import Skipped
from gpt2.tokenize.encoder import Encoded, encode_unit
from gpt2.tokenize.reading import CannotReadNow, Reading, Unit


class Processes:
    """A pool of processes; `run` gives a unit to an idle one."""

    def __init__(self, count: int, reading: Reading, backend: str) -> None:
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process(reading, backend) for _ in range(count)]
        for process in self._all:
            self._idle.put(process)

    def run(self, unit: Unit) -> Iterator[Encoded]:
        """As encode_unit."""
        process = self._idle.get()
        try:
            yield from process.run(unit)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        for process in self._all:
            process.close()


class _Process:
    def __init__(self, reading: Reading, backend: str) -> None:
        self._pipe, theirs = Pipe()
        command = [
            sys.executable,
            "-m",
            "gpt2.tokenize.process_pool",
            str(theirs.fileno()),
            json.dumps(reading),
            backend,
        ]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()  # so that the pipe ends when the process does

    def run(self, unit: Unit) -> Iterator[Encoded]:
        try:
            self._pipe.send(unit.model_dump())
            while True:
                kind, *rest = self._pipe.recv()
                if kind == "end":
                    return
                if kind == "bad":
                    raise UserError(rest[0])
                if kind == "error":
                    raise RuntimeError(rest[0])
                consumed, skipped = rest
                tokens = np.frombuffer(self._pipe.recv_bytes(), dtype=TOKEN)
                yield Encoded(tokens, consumed, tuple(Skipped(**entry) for entry in skipped))
        except (EOFError, ConnectionError):
            status = self._process.wait()
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise UserError(
                f"a tokenizing process {how} while it read {unit.name}; run again, whole shards are kept "
                f"(with fewer of them, tokenize_workers, if memory ran out)"
            ) from None

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.wait()


def serve(pipe: Connection, reading: Reading, backend: str) -> None:
    """Encode the units that come through `pipe` until its other end is gone."""
    from gpt2.tokenize.bpe import make_encoder

    encoder = make_encoder(backend, quiet=True)
    while True:
        unit = Unit(**pipe.recv())
        try:
            for part in encode_unit(unit, reading, encoder):
                pipe.send(("tokens", part.consumed, [entry.model_dump() for entry in part.skipped]))
                pipe.send_bytes(part.tokens.data)
            answer: tuple[Any, ...] = ("end",)
        except (UserError, CannotReadNow) as error:
            answer = ("bad", str(error))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        pipe.send(answer)


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches the parent too, whose end is noticed
    number, reading, backend = arguments
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(number)), Reading(*json.loads(reading)), backend)


if __name__ == "__main__":
    main(sys.argv[1:])
