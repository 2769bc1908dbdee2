"""The tokenize stage: a corpus becomes token shards.

    python -m gpt2.tokenize DIRECTORY

All documents in reading order, each after <|endoftext|>, are one stream of tokens; its first `val_tokens` are shard 0,
for validation, and every following `shard_tokens` another. The bytes depend on the text alone: not on the number of
workers, nor on how often the work was stopped and started again. It goes on after the last whole shard.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from gpt2.config.run import TokenizeConfig
from gpt2.errors import UserError
from gpt2.machine import cpu_count
from gpt2.shards import TOKEN, verify
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import DownloadFacts, ShardEntry, Skipped, TokenizeFacts
from gpt2.stage.file_hashes import Hashes
from gpt2.stage.integrity import Unchanged
from gpt2.stage.manifest import Manifest, canonical
from gpt2.stage.metrics import MetricsWriter
from gpt2.tokenize.bpe import make_encoder
from gpt2.tokenize.corpus import divide, read
from gpt2.tokenize.encoder import Encoded, Encoder, encode_unit
from gpt2.tokenize.ordered_map import in_order
from gpt2.tokenize.process_pool import Processes
from gpt2.tokenize.reading import Batch, Reading, Unit
from gpt2.tokenize.shard_sequence import ShardSequence
from gpt2.tokenize.shard_store import PROGRESS, Folder, WholeShard, shard_name, split_of

SAMPLE_BYTES = 1 << 18


def tokenize(stage: StageDir) -> Manifest:
    """Make the shards of one stage directory.

    Raises:
        UserError: input that is missing or cannot be used, too little of it, or too little space.
    """
    config = stage.config(TokenizeConfig)
    corpus = stage.input("corpus")
    source = corpus.facts(DownloadFacts)
    assert corpus.manifest is not None
    read_files = Unchanged(corpus.path, corpus.manifest)
    if source.kind in ("hub-shards", "local-shards"):
        recorded = {entry.path: entry.sha256 for entry in corpus.manifest.files}
        return adopt(stage, config, corpus.path, source.files, recorded)

    reading = Reading(source.text_column or "text", config.on_bad_input, config.max_document_bytes)
    units, unreadable = divide([(str(corpus.path / name), name) for name in source.files], reading)
    encoder = make_encoder(stage.runtime.tokenize_backend)
    with closing(stage.metrics()) as metrics:
        whole = write_shards(
            Folder(stage.path, read_files.digest),
            units,
            config,
            lambda first: encoded(stage, units, reading, encoder, first),
            expected_tokens(units, reading, encoder),
            metrics,
        )
    read_files.check()
    facts = facts_of(whole, config, encoder.name, unreadable)
    manifest = stage.finish([s.path for s in whole], facts, sha256={s.path: s.sha256 for s in whole})
    (stage.path / PROGRESS).unlink(missing_ok=True)
    return manifest


def write_shards(
    folder: Folder,
    units: Sequence[Unit],
    config: TokenizeConfig,
    parts: Callable[[int], Iterator[tuple[int, Encoded]]],
    expected: int,
    metrics: MetricsWriter | None = None,
) -> tuple[WholeShard, ...]:
    """Write the stream that `parts` gives from a unit on, going on after the whole shards that `folder` has.

    Args:
        parts: first unit -> (index of the unit, tokens), in order.
        expected: tokens of the whole stream, about.

    Raises:
        UserError: too little space, or whatever `parts` raises.
    """
    val_tokens = config.val_tokens or config.shard_tokens
    shards = ShardSequence(folder, config.prefix, plan_of(units, config), val_tokens, config.shard_tokens)
    try:
        if 0 < expected < val_tokens / 2:  # an estimate; facts_of counts
            raise UserError(too_little(f"about {expected:,}", val_tokens))
        check_space(folder, expected, shards.tokens)
        with Reporter(metrics, units, shards) as progress:
            for index, part in parts(shards.start.unit):
                shards.write(index, part.tokens, part.skipped)
                progress.add(index, part.consumed)
        whole = shards.finish(len(units))
        progress.report(len(units), last=True)
        return whole
    except BaseException:
        with suppress(UserError):
            shards.discard()
        raise


def facts_of(
    whole: Sequence[WholeShard], config: TokenizeConfig, backend: str, unreadable: Sequence[Skipped]
) -> TokenizeFacts:
    """What was measured.

    Raises:
        UserError: nothing is left for training.
    """
    val_tokens = config.val_tokens or config.shard_tokens
    total = sum(shard.tokens for shard in whole)
    if total <= val_tokens:
        raise UserError(too_little(f"{total:,}", val_tokens))
    return TokenizeFacts(
        tokenizer=config.tokenizer,
        backend=backend,
        documents=sum(shard.documents for shard in whole),
        train_tokens=total - val_tokens,
        val_tokens=val_tokens,
        shards=tuple(ShardEntry(path=s.path, split=split_of(s.path), tokens=s.tokens) for s in whole),
        skipped=(*unreadable, *(entry for shard in whole for entry in shard.skipped)),
    )


def too_little(tokens: str, val_tokens: int) -> str:
    return (
        f"the corpus has {tokens} tokens and the validation shard alone takes {val_tokens:,}, which leaves nothing to "
        f"train on: give more text or lower val_tokens (a recipe's tokenize.val_tokens, gpt2.tokenize.cluster's "
        "--val-tokens)"
    )


def plan_of(units: Sequence[Unit], config: TokenizeConfig) -> str:
    """Fingerprint of the units and of how they become shards: whole shards of an earlier run are kept if it is the
    same. Where the files lie is no part of it."""
    parts = [unit.model_dump(exclude={"path"}) for unit in units]
    settings = config.identity()
    return hashlib.sha256(canonical([parts, settings]).encode()).hexdigest()


def encoded(
    stage: StageDir, units: Sequence[Unit], reading: Reading, encoder: Encoder, first: int
) -> Iterator[tuple[int, Encoded]]:
    """(index of the unit, tokens) from unit `first` on, in order, made by the cluster or as many workers as the runtime
    says."""
    runtime = stage.runtime
    if runtime.cluster is not None:
        from gpt2.tokenize.dask_encode import connect, encoded_on

        with connect(runtime.cluster) as client:
            # A folder that the user names may hold other things, and the parts of other stages.
            own = runtime.cluster_parts and f"{runtime.cluster_parts.rstrip('/')}/tokenize-{stage.path.name}"
            parts, names = own or str(stage.path / "parts"), set[str]()
            yield from encoded_on(client, units, reading, runtime.tokenize_backend, first, parts, names)
            encoder.name = "; ".join(sorted(names)) or encoder.name  # the facts tell what the workers had
        return
    wanted, backend = runtime.tokenize_workers, runtime.tokenize_backend
    workers = max(1, min(cpu_count() if wanted == "auto" else wanted, len(units) - first))
    # Threads are enough for an encoder that lets go of the interpreter's lock, fed from Arrow's buffers.
    if workers == 1 or (encoder.threads and all(unit.kind == "parquet" for unit in units)):
        yield from in_order(units, lambda unit: encode_unit(unit, reading, encoder), workers, first)
        return
    with closing(Processes(workers, reading, backend)) as processes:
        yield from in_order(units, processes.run, workers, first)


def expected_tokens(units: Sequence[Unit], reading: Reading, encoder: Encoder) -> int:
    """About how many tokens the corpus will have, from a little text of its first, middle and last unit."""
    tokens = consumed = 0
    for index in sorted({0, len(units) // 2, len(units) - 1} if units else ()):
        with suppress(UserError, OSError):  # reported when its turn comes
            batch = next(read(units[index], reading), None)
            if batch is None:  # a file of no rows
                continue
            end = max(1, int(np.searchsorted(batch.offsets, batch.offsets[0] + SAMPLE_BYTES)))
            sample = Batch(batch.data, batch.offsets[: end + 1])
            size, whole = (int(part.offsets[-1] - part.offsets[0]) for part in (sample, batch))
            tokens += len(encoder.encode(sample))
            consumed += batch.consumed * size // max(whole, 1)
    return sum(unit.size for unit in units) * tokens // max(consumed, 1)


def check_space(folder: Folder, expected: int, written: int) -> None:
    """Say what the shards will take, and refuse to start where it is not there.

    Raises:
        UserError: with what is needed and what is free.
    """
    need, free = max(0, expected - written) * TOKEN.itemsize, folder.free()
    room = "" if free is None else f", {_size(free)} free"
    print(f"tokenize: about {expected:,} tokens, {_size(need)} of shards to write{room}", flush=True)
    if free is not None and need > free:
        raise UserError(
            f"the shards need about {_size(need)} and {folder.path} has {_size(free)} free: free {_size(need - free)} "
            f"more or move the store to a larger disk (runtime.store)"
        )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 10**9 else f"{n_bytes / 1e6:,.3f} MB"


class Reporter:
    """Progress to metrics.jsonl every second or so and to the terminal every few, in bytes of input. As a context, it
    also says when nothing comes for long: text without a place to cut is encoded as a whole."""

    METRICS_SECONDS, PRINT_SECONDS, QUIET_SECONDS = 1.0, 5.0, 10.0

    def __init__(self, metrics: MetricsWriter | None, units: Sequence[Unit], shards: ShardSequence) -> None:
        self._metrics, self._shards = metrics, shards
        self._total = sum(unit.size for unit in units)
        self._done = sum(unit.size for unit in units[: shards.start.unit])
        self._before, self._tokens_before = self._done, shards.tokens
        self._started = self._last_metrics = self._last_print = self._last_part = time.monotonic()
        self._unit, self._names = shards.start.unit, [unit.name for unit in units]
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)
        if shards.shards:
            kept = f"{len(shards.shards)} whole shards of an earlier run are kept, {shards.tokens:,} tokens"
            print(f"tokenize: {kept}", flush=True)

    def add(self, unit: int, consumed: int) -> None:
        """Take note of `consumed` more bytes, in unit `unit`."""
        self._done += consumed
        self._unit, self._last_part = unit, time.monotonic()
        if time.monotonic() - self._last_metrics >= self.METRICS_SECONDS:
            self.report(unit)

    def __enter__(self) -> Reporter:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.QUIET_SECONDS):
            quiet = time.monotonic() - self._last_part
            if quiet >= self.QUIET_SECONDS and self._unit < len(self._names):
                print(
                    f"tokenize: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, the next part of "
                    f"{self._names[self._unit]} or of the file after it takes {quiet:,.0f} s so far; "
                    f"tokenize.max_document_bytes limits a document",
                    flush=True,
                )

    def report(self, unit: int, last: bool = False) -> None:
        now = self._last_metrics = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        tokens = self._shards.tokens
        # What a restart has to read again counts neither as tokens nor, once the first shard is full, much as time.
        rate = (tokens - self._tokens_before) / seconds
        figures = {"tokenize/tokens": tokens, "tokenize/tokens_per_second": round(rate)}
        done = self._total if last else min(self._done, self._total)
        if self._metrics is not None:
            self._metrics.write(unit, done=done, total=self._total, unit="bytes", **figures)
        if now - self._last_print >= self.PRINT_SECONDS or last:
            self._last_print = now
            left = (self._total - done) * seconds / max(done - self._before, 1)
            ending = f"in {seconds:,.1f} s" if last else f"{left:,.0f} s left"
            sizes = f"{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
            print(f"tokenize: {sizes}, {tokens:,} tokens, {rate / 1e6:,.2f} M tokens/s, {ending}", flush=True)


def adopt(
    stage: StageDir, config: TokenizeConfig, directory: Path, files: Sequence[str], recorded: Mapping[str, str]
) -> Manifest:
    """Ready-made shards: every token is checked, and each file is linked under the name that ours would have.

    Files with "_val_" in their name come first and are validation, the others training, in the order given. `recorded`
    holds their sha256.

    Raises:
        UserError: a damaged or changed shard, or none for validation or for training.
    """
    ordered = sorted(files, key=lambda name: split_of(name) == "train")
    n_val = sum(split_of(name) == "val" for name in files)
    if n_val in (0, len(files)):
        raise UserError(
            f"of {len(files)} shards {n_val} are for validation (with _val_ in the name): both kinds are needed"
        )
    entries = []
    with closing(stage.metrics()) as metrics:
        for index, name in enumerate(ordered):
            tokens = verify(directory / name).tokens
            target = shard_name(config.prefix, index, n_val)
            link((directory / name).resolve(), stage.path / target)
            entries.append(ShardEntry(path=target, split=split_of(target), tokens=tokens))
            metrics.write(index + 1, done=index + 1, total=len(files), unit="shards")
            print(f"tokenize: {index + 1} of {len(files)} shards checked, {name}: {tokens:,} tokens", flush=True)
    totals = {split: sum(e.tokens for e in entries if e.split == split) for split in ("val", "train")}
    facts = TokenizeFacts(
        tokenizer=config.tokenizer,
        backend="ready-made",
        documents=None,
        train_tokens=totals["train"],
        val_tokens=totals["val"],
        shards=tuple(entries),
    )
    hashes = Hashes(stage.path.parent.parent).of([stage.path / entry.path for entry in entries])
    for name, sha256 in zip(ordered, hashes, strict=True):
        if sha256 != recorded[name]:
            raise UserError(
                f"{(directory / name).resolve()} was changed while the stage read it: sha256 {recorded[name]} is "
                f"recorded, {sha256} is there; put the file back, or run again, and the change is planned"
            )
    paths = [entry.path for entry in entries]
    return stage.finish(paths, facts, sha256=dict(zip(paths, hashes, strict=True)))


def link(source: Path, target: Path) -> None:
    """A hard link, which lasts when the other name is deleted; across file systems a symbolic one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)
