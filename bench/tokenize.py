"""Tokens per second of the tokenize stage and of the plain method, on the same cores and text.

    python -m bench.tokenize [--workers N] [--repeat N] [PARQUET...]

The plain method is that of llm.c's script for FineWeb: documents through `datasets`, `encode_ordinary` in a pool of
processes, lists of ids to numpy; to write a shard, it is converted to a list and each id is checked. That last step is
timed separately, because other scripts omit it. Both write the same shards, which are compared byte for byte. Without
files, the text is the demo corpus, repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpt2.config.run import TokenizeConfig
from gpt2.config.runtime import Runtime
from gpt2.console import command
from gpt2.errors import UserError
from gpt2.machine import cpu_count
from gpt2.shards import TOKEN, ShardWriter, Tokens, header
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import DownloadFacts, TokenizeFacts
from gpt2.stage.manifest import REQUEST, RUNTIME, Request, write_model
from gpt2.tokenizer import EOT, gpt2_encoding

DEFAULT_BYTES = 900_000_000
"""large compared with one second of start-up"""
COST_BYTES = 40_000_000
"""of text, for the table of costs; limited because tiktoken is slow"""

# ---------------------------------------------------------------------------------------------------- the plain method


def plain_tokens(document: dict[str, str]) -> Tokens:
    """Encode one document with the plain method."""
    tokens = np.array([EOT, *gpt2_encoding().encode_ordinary(document["text"])])
    if not ((tokens >= 0).all() and (tokens < 1 << 16).all()):
        raise ValueError("a token that 16 bits cannot hold")
    return tokens.astype(np.uint16)


def plain(files: list[str], folder: Path, cache: Path, workers: int, shard_tokens: int) -> None:
    """Run the plain method: shards in `folder`, the copy of `datasets` in `cache`. Prints the seconds spent on lists of
    whole shards."""
    import datasets

    datasets.disable_progress_bars()
    documents = datasets.load_dataset(
        "parquet", data_files=files, columns=["text"], split="train", cache_dir=str(cache)
    )
    folder.mkdir(parents=True)
    buffer = np.empty(shard_tokens, dtype=np.uint16)
    filled = index = 0
    listing = 0.0

    def write() -> None:
        nonlocal listing
        started = time.perf_counter()
        listed = buffer[:filled].tolist()
        if not all(0 <= token < 1 << 16 for token in listed):
            raise ValueError("a token that 16 bits cannot hold")
        tokens = np.array(listed, dtype=np.uint16)
        listing += time.perf_counter() - started
        split = "train" if index else "val"
        with open(folder / f"fineweb_{split}_{index:06d}.bin", "wb") as file:
            file.write(header(filled) + tokens.tobytes())

    with multiprocessing.Pool(workers) as pool:
        for tokens in pool.imap(plain_tokens, documents, chunksize=16):
            while filled + len(tokens) >= shard_tokens:
                part = shard_tokens - filled
                buffer[filled:], tokens, filled = tokens[:part], tokens[part:], shard_tokens
                write()
                filled, index = 0, index + 1
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    if filled:
        write()
    print(listing)


# ------------------------------------------------------------------------------------------------------------ measuring


class Measured:
    """Wall time, CPU time and peak memory (PSS, shared pages counted once) of a command and its children."""

    def __init__(self, command: list[str]) -> None:
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.peak = 0
        stop = threading.Event()
        watch = threading.Thread(target=self._watch, args=(psutil.Process(process.pid), stop))
        watch.start()
        self.output, _ = process.communicate()
        status = process.returncode
        self.seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu_seconds = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        stop.set()
        watch.join()
        if status:
            raise UserError(f"{' '.join(command)[:200]} exited with status {status}")

    def _watch(self, parent: psutil.Process, stop: threading.Event) -> None:
        while not stop.wait(0.25):
            total = 0
            try:
                for process in (parent, *parent.children(recursive=True)):
                    total += process.memory_full_info().pss
            except (psutil.Error, OSError):
                continue
            self.peak = max(self.peak, total)


def stage_directory(store: Path, files: list[Path], config: TokenizeConfig, workers: int) -> StageDir:
    """A tokenize stage over `files`, ready to run, in a separate store."""
    corpus = Request(stage="download", version=0, config={"files": [str(file) for file in files]})
    download = store / corpus.address
    write_model(download / REQUEST, corpus)
    (download / "data").mkdir()
    names = [f"data/{number:05d}-{file.name}" for number, file in enumerate(files)]
    for name, file in zip(names, files, strict=True):
        (download / name).symlink_to(file.absolute())
    size = sum(file.stat().st_size for file in files)
    facts = DownloadFacts(kind="local", text_column="text", files=tuple(names), total_bytes=size, origin="benchmark")
    StageDir(download).finish(names, facts)
    section = config.model_dump(mode="json")
    request = Request(stage="tokenize", version=0, config=section, inputs={"corpus": corpus.address})
    write_model(store / request.address / REQUEST, request)
    write_model(store / request.address / RUNTIME, Runtime(store=store, tokenize_workers=workers))
    return StageDir(store / request.address)


def costs(file: Path) -> list[tuple[str, float | None, float | None]]:
    """(step, ms per MB of text for the plain method, for this stage) on one core, each step separately."""
    from gpt2.tokenize.bpe import make_encoder
    from gpt2.tokenize.corpus import divide, read
    from gpt2.tokenize.reading import DocumentBatch, ReadOptions

    encoder, reading = make_encoder("auto", quiet=True), ReadOptions("text")
    units, _ = divide([(str(file), file.name)], reading)

    def batches() -> Iterator[DocumentBatch]:
        size = 0
        for unit in units:
            for batch in read(unit, reading):
                size += int(batch.offsets[-1] - batch.offsets[0])
                yield batch
                if size >= COST_BYTES:
                    return

    kept = list(batches())
    megabytes = sum(float(batch.offsets[-1] - batch.offsets[0]) for batch in kept) / 1e6

    def cost(work: Callable[[], Any]) -> tuple[float, Any]:
        started = time.perf_counter()
        result = work()
        return (time.perf_counter() - started) * 1000 / megabytes, result

    encoding = gpt2_encoding()
    arrays = [pa.LargeStringArray.from_buffers(len(b), pa.py_buffer(b.offsets), pa.py_buffer(b.data)) for b in kept]
    reading_cost, _ = cost(lambda: [None for _ in batches()])
    strings_cost, strings = cost(lambda: [text for array in arrays for text in array.to_pylist()])
    plain_encoding, lists = cost(lambda: [encoding.encode_ordinary(text) for text in strings])
    plain_conversion, parts = cost(lambda: [np.array([EOT, *tokens]).astype(np.uint16) for tokens in lists])
    encoder.encode(kept[0])
    our_encoding, tokens = cost(lambda: [encoder.encode(batch) for batch in kept])
    if not np.array_equal(np.concatenate(parts), np.concatenate(tokens)):
        raise UserError("the plain method and this stage give different tokens")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:

        def write(pieces: list[Tokens]) -> None:
            with ShardWriter(Path(folder) / "shard.bin") as shard:
                for piece in pieces:
                    shard.write(piece)

        writing, _ = cost(lambda: write(tokens))
        hashing, _ = cost(lambda: hashlib.sha256(np.concatenate(tokens).astype(TOKEN).tobytes()).digest())
    return [
        ("reading parquet, UTF-8 checked", reading_cost, reading_cost),
        ("Python strings", strings_cost, None),
        ("encoding, checks against tiktoken included", plain_encoding, our_encoding),
        ("lists to uint16", plain_conversion, None),
        ("writing shards, to disk", writing, writing),
        ("sha256 for the manifest", None, hashing),
    ]


# ----------------------------------------------------------------------------------------------------------------- main


def default_text(folder: Path) -> Path:
    """The demo corpus, repeated to about DEFAULT_BYTES."""
    from gpt2.download import installed_docs

    once = folder / "once.parquet"
    installed_docs.write(once, max_bytes=DEFAULT_BYTES)
    table = pq.read_table(once, columns=["text"])
    times = max(1, DEFAULT_BYTES // max(1, table.nbytes))
    path = folder / "documentation.parquet"
    pq.write_table(pa.concat_tables([table] * times), path, row_group_size=2000)
    return path


def compare(files: list[Path], scratch: Path, workers: int, repeat: int, shard_tokens: int | None = None) -> str:
    """Run both methods and compare them in Markdown.

    Args:
        shard_tokens: None: a twentieth of the text's bytes, at most 10 million.

    Raises:
        UserError: a method failed, or the shards differ.
    """
    text_bytes = sum(text_size(file) for file in files)
    config = TokenizeConfig(shard_tokens=shard_tokens or min(10_000_000, max(1, text_bytes // 20)))  # 4 to 5 bytes each
    gpt2_encoding()
    names = [str(file.absolute()) for file in files]
    arguments = json.dumps([names, str(scratch / "plain"), str(scratch / "cache"), workers, config.shard_tokens])
    theirs = Measured([sys.executable, "-m", "bench.tokenize", "--plain", arguments])
    ours, stage = None, None
    for number in range(repeat):
        stage = stage_directory(scratch / f"store-{number}", files, config, workers)
        run = Measured([sys.executable, "-m", "gpt2.tokenize", str(stage.path)])
        ours = run if ours is None or run.seconds < ours.seconds else ours
    assert ours is not None and stage is not None
    facts = stage.facts(TokenizeFacts)
    for shard in facts.shards:
        plain_shard = scratch / "plain" / Path(shard.path).name
        if (stage.path / shard.path).read_bytes() != plain_shard.read_bytes():
            raise UserError(f"{stage.path / shard.path} and {plain_shard} differ")
    tokens = facts.val_tokens + facts.train_tokens
    cache = sum(path.stat().st_size for path in (scratch / "cache").rglob("*") if path.is_file())
    lines = [
        f"{text_bytes / 1e6:,.0f} MB of text, {tokens:,} tokens, {facts.documents:,} documents; {workers} workers on "
        f"{processor()}; {facts.backend}; the {len(facts.shards)} shards are equal byte for byte.",
        "",
        "| | seconds | CPU seconds | tokens/s | MB/s per core | peak memory | extra disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side, disk in (("plain method", theirs, cache), ("this stage", ours, 0)):
        lines.append(
            f"| {name} | {side.seconds:.1f} | {side.cpu_seconds:.1f} | {tokens / side.seconds:,.0f} | "
            f"{text_bytes / 1e6 / side.seconds / workers:.1f} | {side.peak / 1e6:,.0f} MB | {disk / 1e6:,.0f} MB |"
        )
    listing = float(theirs.output)
    without = (theirs.seconds - listing) / ours.seconds
    cpu_ratio = theirs.cpu_seconds / ours.cpu_seconds
    lines += [
        "",
        f"Ratio: **{theirs.seconds / ours.seconds:.1f}**, of CPU time {cpu_ratio:.1f}. The plain method spent "
        f"{listing:.1f} s on lists of whole shards; without them the ratio is {without:.1f}.",
        "",
        "Costs on one core, ms per MB of text:",
        "",
    ]
    lines += ["| step | plain method | this stage |", "|---|---|---|"]
    for step, *values in costs(files[0]):
        lines.append(f"| {step} | " + " | ".join("-" if value is None else f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines)


def text_size(file: Path) -> int:
    """Bytes of text in a parquet file."""
    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        batches = parquet.iter_batches(1000, columns=["text"])
        return sum(pc.sum(pc.binary_length(batch.column(0))).as_py() or 0 for batch in batches)


def processor() -> str:
    """The CPU's name, from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "this machine"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tokenize")
    parser.add_argument(
        "files", nargs="*", type=Path, help="parquet files with a column `text`, all with the same columns"
    )
    parser.add_argument("--workers", type=int, default=min(2, cpu_count()), help="processes or threads of each method")
    parser.add_argument("--repeat", type=int, default=3, help="runs of this stage; the fastest counts")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.plain:
        files, folder, cache, workers, shard_tokens = json.loads(options.plain)
        plain(files, Path(folder), Path(cache), workers, shard_tokens)
        return
    for file in options.files:
        if file.suffix != ".parquet":
            parser.error(f"{file} is not a .parquet file: the plain method reads parquet only")
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-", dir=Path.cwd()) as scratch:
        files = options.files or [default_text(Path(scratch))]
        print(compare(files, Path(scratch), options.workers, options.repeat), flush=True)


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
