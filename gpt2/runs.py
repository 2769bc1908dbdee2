"""The finished trainings of a recipe, also those with overrides.

python -m gpt2.runs 124m [runtime.store=...]    lists them, the newest first
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.config.recipe import load, load_runtime, parse_overrides
from gpt2.errors import UserError
from gpt2.plan import plan
from gpt2.report.reproduce import differences
from gpt2.stage.directory import Provenance
from gpt2.stage.facts import TrainFacts
from gpt2.stage.manifest import MANIFEST, PROVENANCE, REQUEST, Manifest, Request, read_model


@dataclass(frozen=True)
class FinishedTraining:
    """A finished training."""

    directory: Path
    request: Request
    facts: TrainFacts
    ended: float
    """Unix seconds; 0 where it is not recorded"""

    @property
    def checkpoint(self) -> Path:
        return self.directory / self.facts.checkpoint

    def describe(self, recipe: Mapping[str, Any]) -> str:
        """One line: where, when, the validation loss, and what differs from the recipe's train section."""
        changed = [f"train.{field}={value}" for field, value in differences(dict(recipe), self.request.config)]
        ended = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.ended))
        what = " ".join(changed) or "as the recipe says"
        return f"{self.directory} ({ended}, val loss {self.facts.val_loss:.4f}, {what})"


def trainings(recipe: str, store: Path) -> list[FinishedTraining]:
    """The finished trainings in a store that belong to the recipe of that name, the newest first."""
    requests = [read_model(path, Request) for path in store.glob(f"report/*/{REQUEST}")]
    reported = {request.inputs.get("model") for request in requests if request.config.get("name") == recipe}
    finished = []
    for path in store.glob(f"train/*/{MANIFEST}"):
        directory = path.parent
        if not (directory / REQUEST).exists():
            continue
        request, facts = read_model(directory / REQUEST, Request), read_model(path, Manifest).facts
        if isinstance(facts, TrainFacts) and (request.hints.get("recipe") == recipe or request.address in reported):
            record = directory / PROVENANCE
            ended = read_model(record, Provenance).ended if record.exists() else 0.0
            finished.append(FinishedTraining(directory, request, facts, ended))
    return sorted(finished, key=lambda training: training.ended, reverse=True)


def find(recipe: str, words: Sequence[str] = ()) -> Path:
    """The final checkpoint's folder of a recipe's training with overrides, "field=value" each. Without overrides, where
    the recipe as it stands is not finished: of its newest finished training, which is named on stderr.

    Raises:
        UserError: there is none; the text lists those that are finished.
    """
    overrides = parse_overrides(words)
    config, store = load(recipe, overrides), load_runtime(None, overrides).store
    section = load(recipe).train.model_dump(mode="json")
    finished = trainings(config.name, store)
    asked = [word for word in words if not word.startswith("runtime.")]
    try:
        path = store / plan(config, store).train.address / MANIFEST
    except UserError:  # a source that is gone: what was trained on it is not
        if asked or not finished:
            raise
        path = None
    if path is not None and path.exists():
        facts = read_model(path, Manifest).facts
        assert isinstance(facts, TrainFacts)
        return path.parent / facts.checkpoint
    if asked or not finished:
        listing = "; ".join(training.describe(section) for training in finished[:5]) or "none: run the recipe first"
        wanted = f"{config.name} with {' '.join(asked)}" if asked else config.name
        raise UserError(f"training is not finished of {wanted} in {store}; finished of {config.name}: {listing}")
    print(f"note: the newest training of {config.name} is {finished[0].describe(section)}", file=sys.stderr)
    return finished[0].checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.runs", description="The finished trainings of a recipe.")
    parser.add_argument("recipe", help="name in conf/, or path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="runtime.field=value")
    given = parser.parse_args()
    overrides = parse_overrides(given.overrides)
    config = load(given.recipe)
    section = config.train.model_dump(mode="json")
    for training in trainings(config.name, load_runtime(None, overrides).store):
        print(training.describe(section))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
