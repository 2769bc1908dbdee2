"""The tokenize stage: text becomes token shards.

    python -m gpt2.tokenize DIRECTORY

All documents in reading order, each after <|endoftext|>, form one stream of tokens. Its first `val_tokens` are shard 0,
for validation; each following `shard_tokens` are another shard. The bytes depend on the text alone, not on the number
of workers or of restarts. A restart continues after the last complete shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress

import numpy as np

from gpt2.config.run import TokenizeConfig
from gpt2.errors import UserError
from gpt2.machine import cpu_count
from gpt2.shards import TOKEN
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import DownloadFacts, ShardEntry, Skipped, TokenizeFacts
from gpt2.stage.integrity import Unchanged
from gpt2.stage.manifest import Manifest, canonical
from gpt2.stage.metrics import MetricsWriter
from gpt2.tokenize.bpe import make_encoder
from gpt2.tokenize.corpus import divide, read
from gpt2.tokenize.encoder import EncodedPart, Encoder, encode_unit
from gpt2.tokenize.import_shards import import_shards
from gpt2.tokenize.ordered_map import ordered_map
from gpt2.tokenize.process_pool import ProcessPool
from gpt2.tokenize.progress import TokenizeProgress
from gpt2.tokenize.reading import DocumentBatch, ReadOptions, WorkUnit
from gpt2.tokenize.shard_sequence import ShardSequence
from gpt2.tokenize.shard_store import PROGRESS, ShardRecord, ShardStore, split_of

SAMPLE_BYTES = 1 << 18


def tokenize(stage: StageDir) -> Manifest:
    """Write the shards of one stage directory.

    Raises:
        UserError: an input is missing or unusable, the text is too short, or the disk is too small.
    """
    config = stage.config(TokenizeConfig)
    corpus = stage.input("corpus")
    source = corpus.facts(DownloadFacts)
    assert corpus.manifest is not None
    inputs = Unchanged(corpus.path, corpus.manifest)
    if source.kind in ("hub-shards", "local-shards"):
        sha256 = {entry.path: entry.sha256 for entry in corpus.manifest.files}
        return import_shards(stage, config, corpus.path, source.files, sha256)

    options = ReadOptions(source.text_column or "text", config.on_bad_input, config.max_document_bytes)
    units, unreadable = divide([(str(corpus.path / name), name) for name in source.files], options)
    encoder = make_encoder(stage.runtime.tokenize_backend)
    with closing(stage.metrics()) as metrics:
        shards = write_shards(
            ShardStore(stage.path, inputs.digest),
            units,
            config,
            lambda first: encode_units(stage, units, options, encoder, first),
            estimate_tokens(units, options, encoder),
            metrics,
        )
    inputs.check()
    facts = tokenize_facts(shards, config, encoder.name, unreadable)
    manifest = stage.finish([shard.path for shard in shards], facts, sha256={s.path: s.sha256 for s in shards})
    (stage.path / PROGRESS).unlink(missing_ok=True)
    return manifest


def write_shards(
    store: ShardStore,
    units: Sequence[WorkUnit],
    config: TokenizeConfig,
    encode_from: Callable[[int], Iterator[tuple[int, EncodedPart]]],
    estimate: int,
    metrics: MetricsWriter | None = None,
) -> tuple[ShardRecord, ...]:
    """Write the token stream to `store`, after the complete shards that it holds already.

    Args:
        encode_from: index of the first unit -> (index of the unit, its next tokens), in order.
        estimate: tokens of the whole stream, about.

    Raises:
        UserError: the disk is too small, the text is too short, or an error of `encode_from`.
    """
    val_tokens = config.val_tokens or config.shard_tokens
    shards = ShardSequence(store, config.prefix, plan_fingerprint(units, config), val_tokens, config.shard_tokens)
    try:
        if 0 < estimate < val_tokens / 2:  # half: an estimate is rough; tokenize_facts counts
            raise UserError(too_few_tokens(f"about {estimate:,}", val_tokens))
        check_space(store, estimate, shards.tokens)
        with TokenizeProgress(metrics, units, shards) as progress:
            for index, part in encode_from(shards.start.unit):
                shards.write(index, part.tokens, part.skipped)
                progress.add(index, part.consumed)
        records = shards.finish(len(units))
        progress.report(len(units), last=True)
        return records
    except BaseException:
        with suppress(UserError):
            shards.discard()
        raise


def tokenize_facts(
    shards: Sequence[ShardRecord], config: TokenizeConfig, backend: str, unreadable: Sequence[Skipped]
) -> TokenizeFacts:
    """The facts that the manifest records.

    Raises:
        UserError: no tokens are left for training.
    """
    val_tokens = config.val_tokens or config.shard_tokens
    total = sum(shard.tokens for shard in shards)
    if total <= val_tokens:
        raise UserError(too_few_tokens(f"{total:,}", val_tokens))
    return TokenizeFacts(
        tokenizer=config.tokenizer,
        backend=backend,
        documents=sum(shard.documents for shard in shards),
        train_tokens=total - val_tokens,
        val_tokens=val_tokens,
        shards=tuple(ShardEntry(path=s.path, split=split_of(s.path), tokens=s.tokens) for s in shards),
        skipped=(*unreadable, *(entry for shard in shards for entry in shard.skipped)),
    )


def too_few_tokens(tokens: str, val_tokens: int) -> str:
    return (
        f"the corpus has {tokens} tokens and the validation shard takes {val_tokens:,}, so none are left for training: "
        "add text or lower val_tokens (a recipe's tokenize.val_tokens, gpt2.tokenize.cluster's --val-tokens)"
    )


def plan_fingerprint(units: Sequence[WorkUnit], config: TokenizeConfig) -> str:
    """Hash of the units and of the settings that cut their tokens into shards, independent of where the files lie.
    Complete shards of an earlier run are kept if it is equal."""
    parts = [unit.model_dump(exclude={"path"}) for unit in units]
    return hashlib.sha256(canonical([parts, config.identity()]).encode()).hexdigest()


def encode_units(
    stage: StageDir, units: Sequence[WorkUnit], options: ReadOptions, encoder: Encoder, first: int
) -> Iterator[tuple[int, EncodedPart]]:
    """(index of the unit, its next tokens) from unit `first` on, in order, from the cluster or from local workers."""
    runtime = stage.runtime
    if runtime.cluster is not None:
        from gpt2.tokenize.dask_encode import connect, encode_on_cluster

        with connect(runtime.cluster) as client:
            # A subfolder: the user's folder may hold other files, and parts of other stages.
            subfolder = runtime.cluster_parts and f"{runtime.cluster_parts.rstrip('/')}/tokenize-{stage.path.name}"
            parts, names = subfolder or str(stage.path / "parts"), set[str]()
            yield from encode_on_cluster(client, units, options, runtime.tokenize_backend, first, parts, names)
            encoder.name = "; ".join(sorted(names)) or encoder.name  # the facts record the workers' encoders
        return
    wanted = cpu_count() if runtime.tokenize_workers == "auto" else runtime.tokenize_workers
    workers = max(1, min(wanted, len(units) - first))
    # Threads suffice for an encoder that releases the GIL and reads from Arrow's buffers.
    if workers == 1 or (encoder.threads and all(unit.kind == "parquet" for unit in units)):
        yield from ordered_map(units, lambda unit: encode_unit(unit, options, encoder), workers, first)
        return
    with closing(ProcessPool(workers, options, runtime.tokenize_backend)) as pool:
        yield from ordered_map(units, pool.run, workers, first)


def estimate_tokens(units: Sequence[WorkUnit], options: ReadOptions, encoder: Encoder) -> int:
    """Estimate the tokens of the corpus from SAMPLE_BYTES each of its first, middle and last unit."""
    tokens = consumed = 0
    for index in sorted({0, len(units) // 2, len(units) - 1} if units else ()):
        with suppress(UserError, OSError):  # raised again when the unit is encoded
            batch = next(read(units[index], options), None)
            if batch is None:  # a file without rows
                continue
            end = max(1, int(np.searchsorted(batch.offsets, batch.offsets[0] + SAMPLE_BYTES)))
            sample = DocumentBatch(batch.data, batch.offsets[: end + 1])
            size, total = (int(part.offsets[-1] - part.offsets[0]) for part in (sample, batch))
            tokens += len(encoder.encode(sample))
            consumed += batch.consumed * size // max(total, 1)
    return sum(unit.size for unit in units) * tokens // max(consumed, 1)


def check_space(store: ShardStore, estimate: int, written: int) -> None:
    """Print the space that the remaining shards need.

    Raises:
        UserError: less is free.
    """
    need, free = max(0, estimate - written) * TOKEN.itemsize, store.free()
    room = "" if free is None else f", {_size(free)} free"
    print(f"tokenize: about {estimate:,} tokens, {_size(need)} of shards to write{room}", flush=True)
    if free is not None and need > free:
        raise UserError(
            f"the shards need about {_size(need)} and {store.path} has {_size(free)} free: free {_size(need - free)} "
            f"more or move the store to a larger disk (runtime.store)"
        )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 10**9 else f"{n_bytes / 1e6:,.3f} MB"
