"""Tokenization beyond one machine: units encoded by the workers of a Dask cluster, put in order by one process.

    python -m gpt2.cluster --scheduler tcp://host:8786 --output s3://bucket/fineweb [--column text] INPUT...

A worker encodes a unit into a file of its own, a *part*, in a folder that all can reach; parts are taken in order, one
after another, and removed. A worker that is lost loses its units, which others do again. At most twice as many parts
lie there as the cluster has threads. Inputs, parts and output may be any addresses that fsspec understands; the stage
itself (runtime.cluster) keeps its shards in the store. The bytes are those of a single machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np

from gpt2.config import TokenizeConfig
from gpt2.corpus import Reading, Unit, divide
from gpt2.encoder import Encoded, Encoder, encode_unit
from gpt2.errors import UserError
from gpt2.manifest import Skipped, TokenizeFacts
from gpt2.shard_sequence import FOLDER, PROGRESS, Folder, Progress
from gpt2.shards import TOKEN

LOST_WORKERS = 5
"""that a unit may cost before it is taken for the reason"""
CONNECT_SECONDS = 60


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
        count = int(address.removeprefix("local:"))
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
    client: Any, units: Sequence[Unit], reading: Reading, backend: str, first: int, parts: str
) -> Iterator[tuple[int, Encoded]]:
    """(index of the unit, tokens) from unit `first` on, in order, encoded by the workers of `client`.

    Args:
        parts: folder or address for what workers hand over; removed at the end.

    Raises:
        UserError: input that cannot be used, a unit that no worker survives, or a cluster that is gone.
    """
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    folder, root = fsspec.core.url_to_fs(parts)
    _remove(folder, root)  # of a run that was killed
    under_way: deque[tuple[int, int, Any]] = deque()
    following = first

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
        for *_, future in under_way:
            with suppress(Exception):
                future.cancel()
        _remove(folder, root)


def encode_part(unit: dict[str, Any], reading: Reading, backend: str, parts: str) -> dict[str, Any]:
    """On a worker: encode one unit into a new part. {"path", "parts": [(tokens, consumed, skipped)]}, or {"bad": why}
    for input that doing it again would not mend."""
    folder, root = fsspec.core.url_to_fs(parts)
    folder.makedirs(root, exist_ok=True)
    path = f"{root}/{uuid.uuid4().hex}"  # another for each try: of one that was lost, half may be there
    found = []
    try:
        with folder.open(path, "wb") as file:
            for part in encode_unit(Unit(**unit), Reading(*reading), _encoder(backend)):
                file.write(part.tokens.tobytes())
                found.append((len(part.tokens), part.consumed, [entry.model_dump() for entry in part.skipped]))
    except UserError as error:
        return {"bad": str(error)}
    return {"path": path, "parts": found}


@cache
def _encoder(backend: str) -> Encoder:
    from gpt2.bpe import make_encoder

    return make_encoder(backend, quiet=True)


def _remove(folder: Any, root: str) -> None:
    with suppress(FileNotFoundError):
        folder.rm(root, recursive=True)


# ------------------------------------------------------------------------------------------------ output elsewhere


class RemoteFolder(Folder):
    """Whole shards are moved to an address; one at a time lies in a folder of this machine meanwhile."""

    def __init__(self, scratch: Path, address: str) -> None:
        super().__init__(scratch)
        self._there, self._root = fsspec.core.url_to_fs(address)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def free(self) -> int | None:
        return None

    def keep(self, name: str) -> None:
        self._there.makedirs(self._at(FOLDER), exist_ok=True)
        # Under another name first, for where a copy can be seen half done; an object store's appears whole anyway.
        self._there.put_file(str(self.path / name), self._at(f"{name}.tmp"))
        self._there.mv(self._at(f"{name}.tmp"), self._at(name))
        (self.path / name).unlink()

    def size(self, name: str) -> int | None:
        try:
            return int(self._there.info(self._at(name))["size"])
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        try:
            found = self._there.ls(self._at(FOLDER), detail=False)
        except FileNotFoundError:
            return []
        return [f"{FOLDER}/{path.rsplit('/', 1)[-1]}" for path in found]

    def remove(self, name: str) -> None:
        self._there.rm_file(self._at(name))

    def read_progress(self) -> Progress | None:
        try:
            return Progress.model_validate_json(self._there.cat_file(self._at(PROGRESS)))
        except (FileNotFoundError, ValueError):
            return None

    def write_progress(self, progress: Progress) -> None:
        self._there.pipe_file(self._at(PROGRESS), progress.model_dump_json().encode())

    def finish(self, facts: TokenizeFacts) -> None:
        """The facts, as facts.json, are the sign that all is there."""
        self._there.pipe_file(self._at("facts.json"), facts.model_dump_json(indent=2).encode())
        self._there.rm_file(self._at(PROGRESS))


def tokenize_to(
    client: Any, inputs: Sequence[str], output: str, config: TokenizeConfig, column: str, backend: str = "auto"
) -> TokenizeFacts:
    """The tokenize stage from any addresses to any address: shards/ and facts.json under `output`.

    Raises:
        UserError: as the stage.
    """
    from gpt2.tokenize import expected_tokens, facts_of, write_shards

    reading = Reading(column, config.on_bad_input)
    units, unreadable = divide([(path, path.rsplit("/", 1)[-1]) for path in inputs], reading)
    encoder = _encoder(backend)
    with tempfile.TemporaryDirectory(prefix="tokenize-") as scratch:
        folder = RemoteFolder(Path(scratch), output)
        whole = write_shards(
            folder,
            units,
            config,
            lambda first: encoded_on(client, units, reading, backend, first, f"{output.rstrip('/')}/parts"),
            expected_tokens(units, reading, encoder),
        )
        facts = facts_of(whole, config, encoder.name, unreadable)
        folder.finish(facts)
    return facts


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.cluster")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or addresses, in reading order")
    parser.add_argument("--scheduler", required=True, help="tcp://host:8786, or local:N")
    parser.add_argument("--output", required=True, help="address for shards/ and facts.json")
    parser.add_argument("--column", default="text")
    parser.add_argument("--prefix", default="fineweb")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--skip-bad-input", action="store_true")
    options = parser.parse_args(arguments)
    config = TokenizeConfig(
        prefix=options.prefix,
        shard_tokens=options.shard_tokens,
        on_bad_input="skip" if options.skip_bad_input else "error",
    )
    with connect(options.scheduler) as client:
        facts = tokenize_to(client, options.inputs, options.output, config, options.column)
    print(f"{len(facts.shards)} shards, {facts.train_tokens + facts.val_tokens:,} tokens in {options.output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
