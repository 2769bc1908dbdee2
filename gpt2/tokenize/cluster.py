"""Tokenization beyond one machine: units encoded by the workers of a Dask cluster, put in order by one process.

    python -m gpt2.tokenize.cluster --scheduler tcp://host:8786 --output s3://bucket/fineweb [--column text] INPUT...

How the work is divided, gpt2.tokenize.dask_encode says. Inputs, parts and output may be any addresses that fsspec
understands, and inputs patterns too, such as 's3://bucket/text/*.parquet'; the stage itself (runtime.cluster) keeps its
shards in the store. The bytes are those of a single machine. What is finished already is left as it is.
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
from gpt2.tokenize.dask_encode import connect, encoded_on, encoder_of
from gpt2.tokenize.reading import Reading
from gpt2.tokenize.shard_sequence import AT_ONCE
from gpt2.tokenize.shard_store import OutputFacts, RemoteFolder, file_system, shard_bytes, version_of


def expand(inputs: Sequence[str]) -> list[str]:
    """Paths and addresses, with each pattern replaced by what it matches, sorted.

    Raises:
        UserError: a pattern matches nothing, or an address cannot be reached.
    """
    found: list[str] = []
    for path in inputs:
        system, root = file_system(path)
        if not fsspec.core.has_magic(path) or system.exists(root):
            found.append(path)
            continue
        matches = sorted(system.glob(root))
        if not matches:
            raise UserError(f"no file matches {path}: mend the pattern")
        found += [system.unstrip_protocol(match) if "://" in path else match for match in matches]
    return found


def check_scratch(scratch: Path, config: TokenizeConfig, expected: int) -> None:
    """Look whether the shards that may lie in `scratch` at once have room.

    Raises:
        UserError: with what is needed and what is free.
    """
    tokens = max(config.val_tokens or 0, config.shard_tokens) + AT_ONCE * config.shard_tokens
    need, free = min(shard_bytes(tokens), shard_bytes(expected)), shutil.disk_usage(scratch).free
    if need > free:
        raise UserError(
            f"up to {AT_ONCE + 1} shards, {need / 1e6:,.1f} MB, lie in {scratch.parent} on their way, and "
            f"{free / 1e6:,.1f} MB are free there: set TMPDIR to a folder on a larger disk"
        )


def tokenize_to(
    client: Any, inputs: Sequence[str], output: str, config: TokenizeConfig, column: str, backend: str = "auto"
) -> OutputFacts:
    """The tokenize stage from any addresses to any address: shards/ and facts.json under `output`.

    Args:
        inputs: paths, addresses or patterns, in reading order.

    Raises:
        UserError: as the stage, or `output` holds something else, or an input changed while it was read.
    """
    from gpt2.tokenize.stage import expected_tokens, facts_of, plan_of, write_shards

    reading = Reading(column, config.on_bad_input, config.max_document_bytes)
    paths = expand(inputs)
    versions = [version_of(path) for path in paths]
    units, unreadable = divide([(path, path.rsplit("/", 1)[-1]) for path in paths], reading)
    with tempfile.TemporaryDirectory(prefix="tokenize-") as scratch:
        folder = RemoteFolder(Path(scratch), output, canonical([column, versions]))
        plan = folder.fingerprint(plan_of(units, config))
        if (finished := folder.finished(plan)) is not None:
            print(f"tokenize: {without_credentials(output)} is finished already", flush=True)
            return finished
        encoder, names = encoder_of(backend), set[str]()
        expected = expected_tokens(units, reading, encoder)
        check_scratch(Path(scratch), config, expected)
        parts = f"{output.rstrip('/')}/tokenize-parts"
        whole = write_shards(
            folder,
            units,
            config,
            lambda first: encoded_on(client, units, reading, backend, first, parts, names),
            expected,
        )
        made = facts_of(whole, config, "; ".join(sorted(names)) or encoder.name, unreadable)
        for path, before in zip(paths, versions, strict=True):
            if (now := version_of(path)) != before:
                raise UserError(f"{path} changed while it was read, {before} before and {now} now: run again")
        facts = OutputFacts(**made.model_dump(), plan=plan)
        folder.finish(facts)
    return facts


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
