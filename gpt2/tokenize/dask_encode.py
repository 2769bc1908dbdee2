"""Units of a corpus encoded by the workers of a Dask cluster, and taken in order by one process.

A worker encodes a unit into a file of its own, a *part*, in a folder that all can reach; parts are taken in order, one
after another, and removed. A worker that is lost loses its units, which others do again. At most twice as many parts
lie there as the cluster has threads.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np

from gpt2.errors import UserError
from gpt2.shards import TOKEN
from gpt2.stage.facts import Skipped
from gpt2.tokenize.encoder import Encoded, Encoder, encode_unit
from gpt2.tokenize.reading import Reading, Unit
from gpt2.tokenize.shard_store import file_system

LOST_WORKERS = 5
"""that a unit may cost before it is taken for the reason"""
CONNECT_SECONDS = 60
NO_WORKER_SECONDS = 60.0
"""between the lines that say so"""
_PART = re.compile("part-[0-9a-f]{32}")


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """A client of the Dask scheduler at `address`; "local:N" starts N processes here for as long as the block lasts.

    Raises:
        UserError: Dask is not installed, or no scheduler or no worker answers.
    """
    try:
        import distributed
    except ImportError:
        raise UserError("runtime.cluster needs Dask: pip install 'reproduce-gpt2[cluster]'") from None
    if address.startswith("local:"):
        number = address.removeprefix("local:")
        if not number.isdecimal() or not int(number):
            raise UserError(f"{address} is no cluster: write local:N for N processes here, or a scheduler's address")
        count = int(number)
        with (
            distributed.LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Dask scheduler answers at {address} ({error}): start one or mend runtime.cluster"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise UserError(f"the Dask scheduler at {address} has had no worker for {CONNECT_SECONDS} s") from None
        yield client


def encoded_on(
    client: Any,
    units: Sequence[Unit],
    reading: Reading,
    backend: str,
    first: int,
    parts: str,
    names: set[str] | None = None,
) -> Iterator[tuple[int, Encoded]]:
    """(index of the unit, tokens) from unit `first` on, in order, encoded by the workers of `client`.

    Args:
        parts: folder or address for what workers hand over, of this work alone. The parts are removed from it, and it
            too if nothing else is there.
        names: gets the names of the encoders that the workers had.

    Raises:
        UserError: input that cannot be used, a unit that no worker survives, another tiktoken than here, or a cluster
            that is gone.
    """
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    folder, root = file_system(parts)
    _remove_parts(folder, root)  # of a run that was killed
    under_way: deque[tuple[int, int, Any]] = deque()
    following, names = first, set() if names is None else names
    stop = threading.Event()
    threading.Thread(target=_watch, args=(client, stop), name="workers", daemon=True).start()

    def submit(index: int) -> Any:
        return client.submit(encode_part, units[index].model_dump(), reading, backend, parts, pure=False, retries=2)

    try:
        while following < len(units) or under_way:
            window = 2 * max(1, sum(client.nthreads().values()))  # workers may come and go
            while following < len(units) and len(under_way) < window:
                under_way.append((following, 0, submit(following)))
                following += 1
            index, lost, future = under_way.popleft()
            try:
                result = future.result()
            except KilledWorker as error:
                if lost >= LOST_WORKERS:
                    name = units[index].name
                    raise UserError(f"{lost} workers and more were lost over {name} (unit {index}): {error}") from error
                under_way.appendleft((index, lost + 1, submit(index)))
                continue
            except (CancelledError, CommClosedError) as error:
                raise UserError(f"the Dask cluster is gone ({error}); run again, whole shards are kept") from error
            _compare(result, names, backend)
            if "bad" in result:
                raise UserError(result["bad"])
            with folder.open(result["path"], "rb") as file:
                for count, consumed, skipped in result["parts"]:
                    tokens = np.frombuffer(file.read(count * TOKEN.itemsize), dtype=TOKEN)
                    if len(tokens) != count:
                        raise UserError(
                            f"{result['path']}: a worker wrote {count:,} tokens, {len(tokens):,} are there: "
                            f"is {parts} the same folder for all?"
                        )
                    yield index, Encoded(tokens, consumed, tuple(Skipped(**entry) for entry in skipped))
            folder.rm_file(result["path"])
    finally:
        stop.set()
        for *_, future in under_way:
            with suppress(Exception):
                future.cancel()
        _remove_parts(folder, root)


def encode_part(unit: dict[str, Any], reading: Reading, backend: str, parts: str) -> dict[str, Any]:
    """On a worker: encode one unit into a new part. {"path", "parts": [(tokens, consumed, skipped)]}, or {"bad": why}
    for input that doing it again would not mend."""
    this: dict[str, Any] = {"host": platform.node(), "tiktoken": importlib.metadata.version("tiktoken")}
    found = []
    try:
        folder, root = file_system(parts)
        folder.makedirs(root, exist_ok=True)
        path = f"{root}/part-{uuid.uuid4().hex}"  # another for each try: of one that was lost, half may be there
        encoder = encoder_of(backend)
        with folder.open(path, "wb") as file:
            for part in encode_unit(Unit(**unit), Reading(*reading), encoder):
                file.write(part.tokens.tobytes())
                found.append((len(part.tokens), part.consumed, [entry.model_dump() for entry in part.skipped]))
    except UserError as error:
        return this | {"bad": str(error)}
    except ImportError as error:  # what reading an address needs
        return this | {"bad": f"a worker on {this['host']} cannot read {unit['name']}: {error}"}
    return this | {"path": path, "parts": found, "encoder": encoder.name}


def _compare(result: dict[str, Any], names: set[str], backend: str) -> None:
    """Look at what a worker encoded with, and add it to `names`.

    Raises:
        UserError: another tiktoken than here.
    """
    here = importlib.metadata.version("tiktoken")
    if result.get("tiktoken") != here:
        raise UserError(
            f"the worker on {result.get('host')} has tiktoken {result.get('tiktoken')}, this process {here}, and their "
            f"tokens may differ: install the same version of this program and of tiktoken on all and run again"
        )
    name = result.get("encoder")
    if name is None or name in names:
        return
    names.add(name)
    if backend == "auto" and name.startswith("tiktoken"):
        print(
            f"tokenize: workers, the first on {result['host']}, have no fast encoder (is there a C compiler?); "
            f"tiktoken does their work, to the same bytes but several times slower",
            flush=True,
        )


def _watch(client: Any, stop: threading.Event) -> None:
    """Say from time to time that there is no worker: Dask waits for one without a word."""
    since = said = time.monotonic()
    while not stop.wait(NO_WORKER_SECONDS / 12):
        with suppress(Exception):  # a cluster that is gone is for the other thread to report
            now = time.monotonic()
            if client.nthreads():
                since = said = now
            elif now - said >= NO_WORKER_SECONDS:
                said = now
                print(f"tokenize: no worker for {now - since:,.0f} s, waiting", flush=True)


@cache
def encoder_of(backend: str) -> Encoder:
    from gpt2.tokenize.bpe import make_encoder

    return make_encoder(backend, quiet=True)


def _remove_parts(folder: Any, root: str) -> None:
    folder.invalidate_cache()  # others wrote there
    try:
        paths = folder.ls(root, detail=False)
    except FileNotFoundError:
        return
    parts = [path for path in paths if _PART.fullmatch(path.rsplit("/", 1)[-1])]
    for path in parts:
        with suppress(FileNotFoundError):
            folder.rm_file(path)
    if len(parts) == len(paths):
        with suppress(OSError):  # object stores have no folders
            folder.rmdir(root)
