"""The benchmark stage: one benchmark, tokenized once, ready to be scored by models.

python -m gpt2.benchmark DIRECTORY
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gpt2.benchmark import continuation
from gpt2.benchmark.examples import Description, pack, save
from gpt2.benchmark.prompts import ReaderOutput
from gpt2.benchmark.readers import READERS
from gpt2.config.benchmarks import BenchmarkConfig, Continuation
from gpt2.download.sources import BENCHMARK_FORMATS, fetch, known_sha256
from gpt2.download.stage import origin
from gpt2.errors import UserError
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import BenchmarkFacts, TokenizeFacts
from gpt2.tokenizer import gpt2_encoding

ANY: TypeAdapter[BenchmarkConfig] = TypeAdapter(BenchmarkConfig)
KINDS = tuple(str(config.model_fields["kind"].default) for config in READERS)
"""of benchmarks that are made from files of their own"""


def work(stage: StageDir) -> None:
    """Fetch the benchmark's files, or take held-out text, and write benchmark.json, examples.npz and the manifest."""
    config = configured(stage)
    if isinstance(config, Continuation):
        shards = val_shards(stage.input("shards"))
        prepared, files = continuation.read(config, shards), []
        where = f"held-out text of {stage.request.inputs['shards']}"
        sha256: dict[str, str] = {}
    else:
        identity, hints = stage.request.config["source"], stage.request.hints["source"]
        files = fetch(
            identity, hints, stage.path, workers=stage.runtime.download_workers, text_formats=BENCHMARK_FORMATS
        )
        prepared = READERS[type(config)](config, [stage.path / name for name in files], gpt2_encoding().encode_ordinary)
        where, sha256 = origin(identity, hints), known_sha256(identity, stage.path)
    write(stage, config.kind, prepared, where, files, sha256)


def write(
    stage: StageDir, kind: str, prepared: ReaderOutput, where: str, files: list[str], sha256: dict[str, str]
) -> None:
    """The prepared benchmark and the manifest over it and its source files."""
    written = save(pack(describe(kind, prepared, where), prepared.examples), stage.path)
    chances = [part.chance for part in prepared.parts if part.chance is not None]
    facts = BenchmarkFacts(
        kind=kind,
        examples=len(prepared.examples),
        chance=sum(chances) / len(chances) if chances else None,
        origin=where,
        left_out=prepared.left_out,
    )
    stage.metrics().write(0, done=facts.examples, total=facts.examples, unit="examples")
    stage.finish([*files, *written], facts, sha256=sha256)
    lacking = f", without {', '.join(facts.left_out)}" if facts.left_out else ""
    print(f"{facts.kind}: {facts.examples:,} examples from {where}{lacking}", flush=True)


def describe(kind: str, prepared: ReaderOutput, where: str) -> Description:
    return Description(
        kind=kind, prompt=prepared.prompt, origin=where, parts=prepared.parts, left_out=prepared.left_out
    )


def configured(stage: StageDir) -> BenchmarkConfig:
    """The stage's configuration. The request holds what a source *is*; the hints what the user wrote."""
    section: dict[str, Any] = dict(stage.request.config)
    if "source" in section:
        section["source"] = stage.request.hints["source"]["source"]
    return ANY.validate_python(section)


def prepare_files(kind: str, prompt: str, files: list[Path], directory: Path, limit: int | None = None) -> None:
    """Prepare a benchmark from its own files into `directory`, outside of any store.

    Args:
        kind: one of `KINDS`.
        prompt: for HellaSwag "llm.c" (or empty) or "harness".
        files: of the benchmark; a folder stands for all its files that a benchmark may be made of.
        limit: only the first so many examples.

    Raises:
        UserError: no such kind, or files that are not of it.
    """
    where = ", ".join(str(file) for file in files)  # as given: a folder may hold a hundred
    files = _unfolded(files)
    section: dict[str, Any] = {"kind": kind, "source": {"kind": "local", "paths": [str(file) for file in files]}}
    try:
        options = ({"prompt": prompt} if prompt else {}) | ({"limit": limit} if limit else {})
        config = ANY.validate_python(section | options)
    except ValidationError as error:
        raise UserError(f"benchmark {kind}{':' + prompt if prompt else ''}: {error.errors()[0]['msg']}") from error
    prepared = READERS[type(config)](config, files, gpt2_encoding().encode_ordinary)
    save(pack(describe(kind, prepared, where), prepared.examples), directory)


def _unfolded(paths: list[Path]) -> list[Path]:
    """The paths with each folder replaced by its files, also those in its folders, by name; other files are passed
    over: a folder that was fetched may hold a README."""
    files: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(BENCHMARK_FORMATS))
            if not inside:
                raise UserError(f"{path} holds no file of a benchmark: those end in {', '.join(BENCHMARK_FORMATS)}")
        files += inside
    return files


def val_shards(tokenized: StageDir) -> list[Path]:
    """Paths of the validation shards of a finished tokenize stage, in order."""
    facts = tokenized.facts(TokenizeFacts)
    return [tokenized.path / shard.path for shard in facts.shards if shard.split == "val"]
