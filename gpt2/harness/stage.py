"""The harness stage: lm-evaluation-harness itself on the finished model, for what our own benchmarks do not cover.

    python -m gpt2.harness DIRECTORY

A task whose data cannot be had fails the stage, so that a hole is never taken for a result; the flow goes on without it
and the report says so.
"""

from __future__ import annotations

import json

from gpt2.atomic import write_text
from gpt2.download.sources import HARNESS_FORMATS, fetch, known_sha256
from gpt2.errors import UserError
from gpt2.harness.lm_eval import run_harness
from gpt2.machine import device_type
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import HarnessFacts, TrainFacts

RESULTS = "results.json"


def work(stage: StageDir) -> None:
    """Measure and write results.json: the figures, and what the harness logged of every example.

    Raises:
        UserError: the harness is not installed, or a task could not be run.
    """
    config = stage.request.config
    files: list[str] = []
    if config["data"]:
        files = fetch(config["source"], stage.request.hints["source"], stage.path, text_formats=HARNESS_FORMATS)
    model = stage.input("model")
    results = run_harness(
        model.path / model.facts(TrainFacts).checkpoint,
        config["tasks"],
        data={task: stage.path / files[index] for task, index in config["data"].items()},
        limit=config["limit"],
        device=device_type(stage.runtime.gpus),
    )
    if results.skipped:
        raise UserError("; ".join(f"{task} could not be run: {why}" for task, why in results.skipped.items()))
    write_text(stage.path / RESULTS, json.dumps(results._asdict(), default=str) + "\n")
    facts = HarnessFacts(
        version=results.version,
        figures=results.figures,
        examples={task: len(samples) for task, samples in results.samples.items()},
    )
    sha256 = known_sha256(config["source"], stage.path) if files else {}
    stage.finish([*files, RESULTS], facts, sha256=sha256)
    for task, figures in facts.figures.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
