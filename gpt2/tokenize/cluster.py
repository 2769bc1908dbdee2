"""Tokenization on a Dask cluster: workers encode units, one process writes the shards in order.

    python -m gpt2.tokenize.cluster --scheduler tcp://host:8786 --output s3://bucket/fineweb [--column text] INPUT...

Inputs, parts and output may be any fsspec addresses; inputs may be patterns, such as 's3://bucket/text/*.parquet'. (The
stage itself with runtime.cluster keeps its shards in the store.) The bytes equal those of a single machine. A finished
output is left unchanged. See gpt2.tokenize.dask_encode for the division of work.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]

from gpt2.config.run import TokenizeConfig
from gpt2.console import command
from gpt2.errors import UserError, without_credentials
from gpt2.stage.manifest import canonical
from gpt2.tokenize.corpus import divide
from gpt2.tokenize.dask_encode import cached_encoder, connect, encode_on_cluster
from gpt2.tokenize.reading import ReadOptions
from gpt2.tokenize.shard_sequence import MAX_PENDING
from gpt2.tokenize.shard_store import OutputFacts, RemoteShardStore, file_system, shard_bytes, version_of
from gpt2.tokenize.stage import estimate_tokens, plan_fingerprint, tokenize_facts, write_shards


def expand(inputs: Sequence[str]) -> list[str]:
    """Paths and addresses, with each pattern replaced by its matches, sorted.

    Raises:
        UserError: a pattern matches nothing, or an address cannot be reached.
    """
    paths: list[str] = []
    for path in inputs:
        system, root = file_system(path)
        if not fsspec.core.has_magic(path) or system.exists(root):
            paths.append(path)
            continue
        matches = sorted(system.glob(root))
        if not matches:
            raise UserError(f"no file matches {path}: correct the pattern")
        paths += [system.unstrip_protocol(match) if "://" in path else match for match in matches]
    return paths


def check_scratch(scratch: Path, config: TokenizeConfig, estimate: int) -> None:
    """Check that the shards that may be in `scratch` at the same time fit.

    Raises:
        UserError: they need more than is free.
    """
    tokens = max(config.val_tokens or 0, config.shard_tokens) + MAX_PENDING * config.shard_tokens
    need, free = min(shard_bytes(tokens), shard_bytes(estimate)), shutil.disk_usage(scratch).free
    if need > free:
        raise UserError(
            f"up to {MAX_PENDING + 1} shards, {need / 1e6:,.1f} MB, are written to {scratch.parent} before upload, and "
            f"{free / 1e6:,.1f} MB are free: set TMPDIR to a folder on a larger disk"
        )


def tokenize_to(
    client: Any, inputs: Sequence[str], output: str, config: TokenizeConfig, column: str, backend: str = "auto"
) -> OutputFacts:
    """Tokenize files at any addresses into shards/ and facts.json at address `output`.

    Args:
        inputs: paths, addresses or patterns, in reading order.

    Raises:
        UserError: as the stage, or `output` holds shards of other inputs, or an input changed while it was read.
    """
    options = ReadOptions(column, config.on_bad_input, config.max_document_bytes)
    paths = expand(inputs)
    versions = [version_of(path) for path in paths]
    units, unreadable = divide([(path, path.rsplit("/", 1)[-1]) for path in paths], options)
    with tempfile.TemporaryDirectory(prefix="tokenize-") as scratch:
        store = RemoteShardStore(Path(scratch), output, canonical([column, versions]))
        plan = store.fingerprint(plan_fingerprint(units, config))
        if (finished := store.finished(plan)) is not None:
            print(f"tokenize: {without_credentials(output)} is finished already", flush=True)
            return finished
        encoder, names = cached_encoder(backend), set[str]()
        estimate = estimate_tokens(units, options, encoder)
        check_scratch(Path(scratch), config, estimate)
        parts = f"{output.rstrip('/')}/tokenize-parts"
        shards = write_shards(
            store,
            units,
            config,
            lambda first: encode_on_cluster(client, units, options, backend, first, parts, names),
            estimate,
        )
        facts = tokenize_facts(shards, config, "; ".join(sorted(names)) or encoder.name, unreadable)
        for path, before in zip(paths, versions, strict=True):
            if (after := version_of(path)) != before:
                raise UserError(f"{path} changed while it was read, from {before} to {after}: run again")
        output_facts = OutputFacts(**facts.model_dump(), plan=plan)
        store.finish(output_facts)
    return output_facts


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.tokenize.cluster")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, addresses or patterns, in reading order")
    parser.add_argument("--scheduler", required=True, help="tcp://host:8786, or local:N")
    parser.add_argument("--output", required=True, help="address for shards/ and facts.json")
    parser.add_argument("--column", default="text")
    parser.add_argument("--prefix", default="fineweb")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--val-tokens", type=int, help="of the validation shard; default: --shard-tokens")
    parser.add_argument("--max-document-bytes", type=int, help="a longer row or line is bad input")
    parser.add_argument("--skip-bad-input", action="store_true")
    options = parser.parse_args(arguments)
    config = TokenizeConfig(
        prefix=options.prefix,
        shard_tokens=options.shard_tokens,
        val_tokens=options.val_tokens,
        max_document_bytes=options.max_document_bytes,
        on_bad_input="skip" if options.skip_bad_input else "error",
    )
    with connect(options.scheduler) as client:
        facts = tokenize_to(client, options.inputs, options.output, config, options.column)
    output = without_credentials(options.output)
    print(f"{len(facts.shards)} shards, {facts.train_tokens + facts.val_tokens:,} tokens in {output}")


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
