"""Token shards from elsewhere, in llm.c's format: every token is checked and each file is linked into the store."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from gpt2.config.run import TokenizeConfig
from gpt2.errors import UserError
from gpt2.shards import verify
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import ShardEntry, TokenizeFacts
from gpt2.stage.file_hashes import Hashes
from gpt2.stage.manifest import Manifest
from gpt2.tokenize.shard_store import shard_name, split_of


def import_shards(
    stage: StageDir, config: TokenizeConfig, directory: Path, files: Sequence[str], sha256: Mapping[str, str]
) -> Manifest:
    """Verify shards, link them under this project's names and finish the stage.

    Files with "_val_" in their name come first and are for validation, the others for training, in the given order.

    Args:
        files: relative to `directory`.
        sha256: of each file, as the input's manifest records it.

    Raises:
        UserError: a shard is damaged or changed, or one of the two splits has no shard.
    """
    ordered = sorted(files, key=lambda name: split_of(name) == "train")
    n_val = sum(split_of(name) == "val" for name in files)
    if n_val in (0, len(files)):
        raise UserError(
            f"{n_val} of {len(files)} shards are for validation (with _val_ in the name): both splits are required"
        )
    entries = []
    with closing(stage.metrics()) as metrics:
        for index, name in enumerate(ordered):
            tokens = verify(directory / name).tokens
            target = shard_name(config.prefix, index, n_val)
            _link((directory / name).resolve(), stage.path / target)
            entries.append(ShardEntry(path=target, split=split_of(target), tokens=tokens))
            metrics.write(index + 1, done=index + 1, total=len(files), unit="shards")
            print(f"tokenize: {index + 1} of {len(files)} shards checked, {name}: {tokens:,} tokens", flush=True)
    totals = {split: sum(entry.tokens for entry in entries if entry.split == split) for split in ("val", "train")}
    facts = TokenizeFacts(
        tokenizer=config.tokenizer,
        backend="ready-made",
        documents=None,
        train_tokens=totals["train"],
        val_tokens=totals["val"],
        shards=tuple(entries),
    )
    paths = [entry.path for entry in entries]
    hashes = Hashes(stage.path.parent.parent).of([stage.path / path for path in paths])
    for name, actual in zip(ordered, hashes, strict=True):
        if actual != sha256[name]:
            raise UserError(
                f"{(directory / name).resolve()} was changed while the stage read it: the manifest records sha256 "
                f"{sha256[name]}, the file has {actual}; restore the file, or run again to plan with the new one"
            )
    return stage.finish(paths, facts, sha256=dict(zip(paths, hashes, strict=True)))


def _link(source: Path, target: Path) -> None:
    """Make a hard link, which survives deletion of `source`; across file systems a symbolic link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)
