"""Stage directories for tests: a finished download, and a tokenize stage that reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.config.run import TokenizeConfig
from gpt2.config.runtime import Runtime
from gpt2.shards import open_shard
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import DownloadFacts
from gpt2.stage.manifest import REQUEST, RUNTIME, Request, write_model
from gpt2.tokenizer import EOT, gpt2_encoding


def tokenize_stage(
    store: Path,
    files: Sequence[Path],
    *,
    kind: str = "local",
    column: str = "text",
    runtime: dict[str, Any] | None = None,
    **config: Any,
) -> StageDir:
    """A tokenize stage whose corpus is `files`, ready to run; config is TokenizeConfig's fields."""
    identity = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    corpus = Request(
        stage="download", version=1, config={"source": {"kind": kind, "files": identity, "text_column": column}}
    )
    download = store / corpus.address
    write_model(download / REQUEST, corpus)
    names = []
    for index, path in enumerate(files):
        name = f"data/{index:05d}-{path.name}"
        (download / "data").mkdir(exist_ok=True)
        (download / name).unlink(missing_ok=True)
        (download / name).symlink_to(path.absolute())
        names.append(name)
    size = sum(path.stat().st_size for path in files)
    facts = DownloadFacts(kind=kind, text_column=column, files=tuple(names), total_bytes=size, origin="test")
    StageDir(download).finish(names, facts)
    section = TokenizeConfig(**config).model_dump(mode="json")
    request = Request(stage="tokenize", version=1, config=section, inputs={"corpus": corpus.address})
    directory = store / request.address
    write_model(directory / REQUEST, request)
    write_model(directory / RUNTIME, Runtime(store=store, **(runtime or {})))
    return StageDir(directory)


def stream(stage: StageDir) -> list[int]:
    """All tokens of a finished tokenize stage, in order."""
    manifest = stage.manifest
    assert manifest is not None
    return np.concatenate([open_shard(stage.path / entry.path) for entry in manifest.files]).tolist()  # type: ignore[no-any-return]


def expected(documents: Sequence[str]) -> list[int]:
    """tiktoken's tokens of the documents."""
    encoding = gpt2_encoding()
    return [token for text in documents for token in (EOT, *encoding.encode_ordinary(text))]
