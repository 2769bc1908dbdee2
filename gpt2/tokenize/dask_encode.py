"""Units of a corpus encoded by the workers of a Dask cluster and consumed in order by one process.

A worker encodes a unit into a *part*, one file in a folder that all can reach. This process reads parts in order and
removes them. The units of a lost worker are encoded again. At most two parts per thread of the cluster exist at a time.
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
from gpt2.tokenize.encoder import EncodedPart, Encoder, encode_unit
from gpt2.tokenize.reading import ReadOptions, WorkUnit
from gpt2.tokenize.shard_store import file_system

MAX_LOST_WORKERS = 5
"""per unit; a unit that kills more is reported"""
CONNECT_SECONDS = 60
NO_WORKER_SECONDS = 60.0
"""between two warnings"""
_PART = re.compile("part-[0-9a-f]{32}")


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """A client of the Dask scheduler at `address`; "local:N" starts N local processes for the duration of the block.

    Raises:
        UserError: Dask is not installed, or no scheduler or worker answers within CONNECT_SECONDS.
    """
    try:
        import distributed
    except ImportError:
        raise UserError("runtime.cluster needs Dask: pip install 'reproduce-gpt2[cluster]'") from None
    if address.startswith("local:"):
        number = address.removeprefix("local:")
        if not number.isdecimal() or not int(number):
            raise UserError(f"{address} is no cluster: write local:N for N local processes, or a scheduler's address")
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
            f"no Dask scheduler answers at {address} ({error}): start one or correct runtime.cluster"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise UserError(
                f"the Dask scheduler at {address} has no worker after {CONNECT_SECONDS} s: start one"
            ) from None
        yield client


def encode_on_cluster(
    client: Any,
    units: Sequence[WorkUnit],
    options: ReadOptions,
    backend: str,
    first: int,
    parts: str,
    names: set[str] | None = None,
) -> Iterator[tuple[int, EncodedPart]]:
    """(index of the unit, its next tokens) from unit `first` on, in order, encoded by the workers of `client`.

    Args:
        parts: folder or address for the parts of this call alone. Parts are removed from it, and the folder if it is
            then empty.
        names: receives the names of the workers' encoders.

    Raises:
        UserError: unusable input, a unit that kills more than MAX_LOST_WORKERS workers, a different version of tiktoken
            on a worker, or a lost cluster.
    """
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    folder, root = file_system(parts)
    _remove_parts(folder, root)  # of a killed run
    in_flight: deque[tuple[int, int, Any]] = deque()
    next_index, names = first, set() if names is None else names
    stop = threading.Event()
    threading.Thread(target=_watch, args=(client, stop), name="workers", daemon=True).start()

    def submit(index: int) -> Any:
        return client.submit(encode_part, units[index].model_dump(), options, backend, parts, pure=False, retries=2)

    try:
        while next_index < len(units) or in_flight:
            window = 2 * max(1, sum(client.nthreads().values()))  # the number of workers may change
            while next_index < len(units) and len(in_flight) < window:
                in_flight.append((next_index, 0, submit(next_index)))
                next_index += 1
            index, lost, future = in_flight.popleft()
            try:
                result = future.result()
            except KilledWorker as error:
                if lost >= MAX_LOST_WORKERS:
                    name = units[index].name
                    raise UserError(f"{name} (unit {index}) killed more than {lost} Dask workers: {error}") from error
                in_flight.appendleft((index, lost + 1, submit(index)))
                continue
            except (CancelledError, CommClosedError) as error:
                raise UserError(f"the Dask cluster is lost ({error}); run again, whole shards are kept") from error
            _compare(result, names, backend)
            if "bad" in result:
                raise UserError(result["bad"])
            with folder.open(result["path"], "rb") as file:
                for count, consumed, skipped in result["parts"]:
                    tokens = np.frombuffer(file.read(count * TOKEN.itemsize), dtype=TOKEN)
                    if len(tokens) != count:
                        raise UserError(
                            f"{result['path']}: a worker wrote {count:,} tokens, this process reads {len(tokens):,}: "
                            f"set runtime.cluster_parts to a folder that all machines share, not {parts}"
                        )
                    yield index, EncodedPart(tokens, consumed, tuple(Skipped(**entry) for entry in skipped))
            folder.rm_file(result["path"])
    finally:
        stop.set()
        for *_, future in in_flight:
            with suppress(Exception):
                future.cancel()
        _remove_parts(folder, root)


def encode_part(unit: dict[str, Any], options: ReadOptions, backend: str, parts: str) -> dict[str, Any]:
    """On a worker: encode one unit into a new part.

    Returns:
        {"path", "parts": [(tokens, consumed, skipped)], "encoder"}, or {"bad": message} for unusable input, which a
        retry would not change; and in both cases "host" and "tiktoken".
    """
    worker: dict[str, Any] = {"host": platform.node(), "tiktoken": importlib.metadata.version("tiktoken")}
    sizes = []
    try:
        folder, root = file_system(parts)
        folder.makedirs(root, exist_ok=True)
        path = f"{root}/part-{uuid.uuid4().hex}"  # unique per try: a lost worker may leave half a part
        encoder = cached_encoder(backend)
        with folder.open(path, "wb") as file:
            for part in encode_unit(WorkUnit(**unit), ReadOptions(*options), encoder):
                file.write(part.tokens.tobytes())
                sizes.append((len(part.tokens), part.consumed, [entry.model_dump() for entry in part.skipped]))
    except UserError as error:
        return worker | {"bad": str(error)}
    except ImportError as error:  # a package that reading the address needs
        return worker | {"bad": f"a worker on {worker['host']} cannot read {unit['name']}: {error}"}
    return worker | {"path": path, "parts": sizes, "encoder": encoder.name}


def _compare(result: dict[str, Any], names: set[str], backend: str) -> None:
    """Check a worker's version of tiktoken and add its encoder to `names`.

    Raises:
        UserError: the versions differ.
    """
    version = importlib.metadata.version("tiktoken")
    if result.get("tiktoken") != version:
        raise UserError(
            f"the worker on {result.get('host')} has tiktoken {result.get('tiktoken')}, this process {version}, and "
            f"their tokens may differ: install the same versions of this program and of tiktoken and run again"
        )
    name = result.get("encoder")
    if name is None or name in names:
        return
    names.add(name)
    if backend == "auto" and name.startswith("tiktoken"):
        print(
            f"tokenize: workers, the first on {result['host']}, have no fast encoder (install a C compiler); "
            f"tiktoken encodes there, to the same bytes but several times slower",
            flush=True,
        )


def _watch(client: Any, stop: threading.Event) -> None:
    """Print a line every NO_WORKER_SECONDS while the cluster has no worker; Dask waits silently."""
    since = last_print = time.monotonic()
    while not stop.wait(NO_WORKER_SECONDS / 12):
        with suppress(Exception):  # the main thread reports a lost cluster
            now = time.monotonic()
            if client.nthreads():
                since = last_print = now
            elif now - last_print >= NO_WORKER_SECONDS:
                last_print = now
                print(f"tokenize: no worker for {now - since:,.0f} s, waiting", flush=True)


@cache
def cached_encoder(backend: str) -> Encoder:
    from gpt2.tokenize.bpe import make_encoder

    return make_encoder(backend, quiet=True)


def _remove_parts(folder: Any, root: str) -> None:
    folder.invalidate_cache()  # other processes wrote to it
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
