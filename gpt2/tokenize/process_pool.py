"""Processes that read and encode units, for work that holds the GIL: tiktoken's Python calls and JSON parsing."""

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
from gpt2.tokenize.encoder import EncodedPart, encode_unit
from gpt2.tokenize.reading import ReadOptions, TransientReadError, WorkUnit


class ProcessPool:
    """`run` gives a unit to an idle process."""

    def __init__(self, count: int, options: ReadOptions, backend: str) -> None:
        self._workers = [_Worker(options, backend) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def run(self, unit: WorkUnit) -> Iterator[EncodedPart]:
        """See encode_unit.

        Raises:
            UserError: also where the process is killed.
        """
        worker = self._idle.get()
        try:
            yield from worker.run(unit)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process, and this end of its pipe."""

    def __init__(self, options: ReadOptions, backend: str) -> None:
        self._pipe, child = Pipe()
        program = [sys.executable, "-m", "gpt2.tokenize.process_pool"]
        self.process = subprocess.Popen(
            [*program, str(child.fileno()), json.dumps(options), backend],
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
        )
        child.close()  # so that the pipe closes when the process ends

    def run(self, unit: WorkUnit) -> Iterator[EncodedPart]:
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
                yield EncodedPart(tokens, consumed, tuple(Skipped(**entry) for entry in skipped))
        except (EOFError, ConnectionError):
            status = self.process.wait()
            reason = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
            raise UserError(
                f"a tokenizing process {reason} while it read {unit.name}; run again, whole shards are kept "
                f"(lower runtime.tokenize_workers if memory ran out)"
            ) from None

    def close(self) -> None:
        self._pipe.close()
        self.process.terminate()
        self.process.wait()


def serve(pipe: Connection, options: ReadOptions, backend: str) -> None:
    """Encode the units that arrive through `pipe` until it is closed."""
    from gpt2.tokenize.bpe import make_encoder

    encoder = make_encoder(backend, quiet=True)
    while True:
        unit = WorkUnit(**pipe.recv())
        try:
            for part in encode_unit(unit, options, encoder):
                pipe.send(("tokens", part.consumed, [entry.model_dump() for entry in part.skipped]))
                pipe.send_bytes(part.tokens.data)
            reply: tuple[Any, ...] = ("end",)
        except (UserError, TransientReadError) as error:
            reply = ("bad", str(error))
        except Exception as error:
            reply = ("error", f"{type(error).__name__}: {error}")
        pipe.send(reply)


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too; its exit closes the pipe
    descriptor, options, backend = arguments
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(descriptor)), ReadOptions(*json.loads(options)), backend)


if __name__ == "__main__":
    main(sys.argv[1:])
