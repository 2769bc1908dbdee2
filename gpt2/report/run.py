"""Reads a run from the directories of its stages: manifests, requests and metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpt2.config.recipe import load
from gpt2.config.run import EvaluateConfig, Published, ReportConfig, RunConfig, TokenizeConfig
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.stage.directory import Provenance, StageDir
from gpt2.stage.facts import (
    BenchmarkFacts,
    DownloadFacts,
    EvaluateFacts,
    HarnessFacts,
    Score,
    TokenizeFacts,
    TrainFacts,
)
from gpt2.stage.manifest import METRICS, PROVENANCE, Manifest, Request, read_model
from gpt2.stage.metrics import NOT_METRICS, read_metrics

SAMPLES, ANOMALIES = "samples.jsonl", "anomalies.jsonl"


class ReportRequest(ReportConfig):
    """Config of the report stage: the recipe's name and its report section."""

    name: str


class Measured(Published):
    """A baseline: another model, evaluated like this run."""

    scores: dict[str, Score] = {}  # by benchmark


@dataclass(frozen=True)
class StageRecord:
    """One finished stage."""

    label: str
    request: Request
    manifest: Manifest
    provenance: Provenance | None

    @property
    def bytes(self) -> int:
        """Total size of the files in the manifest."""
        return sum(entry.size for entry in self.manifest.files)

    @property
    def seconds(self) -> float | None:
        """Wall time of the last session."""
        return self.provenance.ended - self.provenance.started if self.provenance else None


class Curve(NamedTuple):
    """A metric over training: finite values, sorted by step."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass
class Curves:
    """The metrics of metrics.jsonl by name."""

    by_name: dict[str, Curve] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)  # name -> number of steps with NaN or infinity

    def __getitem__(self, name: str) -> Curve:
        return self.by_name.get(name, Curve())


class Sample(NamedTuple):
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Run:
    """Everything that a report shows."""

    address: str
    report: ReportRequest
    stages: tuple[StageRecord, ...]  # download, tokenize, benchmarks, train, evaluate[, harness]
    train: TrainConfig
    train_facts: TrainFacts
    tokenize: TokenizeConfig
    tokenize_facts: TokenizeFacts
    download_facts: DownloadFacts
    evaluate: EvaluateConfig
    evaluate_facts: EvaluateFacts
    benchmarks: dict[str, BenchmarkFacts]
    curves: Curves
    samples: tuple[Sample, ...]
    anomalies: tuple[dict[str, Any], ...]
    measured: tuple[Measured, ...] = ()  # baselines, evaluated on the same shard and benchmarks
    harness: HarnessFacts | None = None
    without_harness: str | None = None  # why a requested harness stage did not run
    recipe: RunConfig | None = None  # the current recipe of the run's name, None without one

    def stage(self, label: str) -> StageRecord:
        return next(stage for stage in self.stages if stage.label == label)

    @property
    def published(self) -> tuple[Published, ...]:
        """Figures of other models: measured ones first, then published ones."""
        return (*self.measured, *self.report.published)

    @property
    def device(self) -> str:
        """The devices of all training sessions."""
        return self.train_facts.device if self.gpu_hours is not None else "the CPU"

    @property
    def hours(self) -> float:
        """Wall time of all training sessions."""
        return self.train_facts.total_seconds / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Summed over sessions; None on CPUs."""
        return self.train_facts.gpu_seconds / 3600 or None

    @property
    def dollars(self) -> float | None:
        """None without a price or GPUs."""
        if self.gpu_hours is None or not self.report.dollars_per_gpu_hour:
            return None
        return self.gpu_hours * self.report.dollars_per_gpu_hour

    @property
    def flops(self) -> float:
        return self.train_facts.tokens * self.train_facts.flops_per_token

    @property
    def epochs(self) -> float:
        return self.train_facts.tokens / self.tokenize_facts.train_tokens

    def tokens_at(self, step: int) -> int:
        """Tokens trained on after `step` steps; the batch size is constant."""
        return step * self.train.total_batch_size


def gather(directory: StageDir) -> Run:
    """Reads the run of a report stage.

    Raises:
        UserError: an input stage is not finished, or a record has an unknown format.
    """
    shards, model, scores = (directory.input(role) for role in ("shards", "model", "scores"))
    corpus = shards.input("corpus")
    benchmarks = _benchmarks(model, scores)
    named = {
        "download": corpus,
        "tokenize": shards,
        **{f"benchmark-{name}": benchmark for name, benchmark in benchmarks.items()},
        "train": model,
        "evaluate": scores,
    }
    harness = directory.input("harness") if "harness" in directory.request.inputs else None
    if harness is not None:
        named["harness"] = harness
    roles = [role for role in directory.request.inputs if role.startswith("baseline:")]
    baselines = {role.removeprefix("baseline:"): directory.input(role) for role in roles}
    report = directory.config(ReportRequest)
    return Run(
        address=directory.request.address,
        report=report,
        stages=tuple(_record(label, stage) for label, stage in named.items()),
        train=model.config(TrainConfig),
        train_facts=model.facts(TrainFacts),
        tokenize=shards.config(TokenizeConfig),
        tokenize_facts=shards.facts(TokenizeFacts),
        download_facts=corpus.facts(DownloadFacts),
        evaluate=scores.config(EvaluateConfig),
        evaluate_facts=scores.facts(EvaluateFacts),
        benchmarks={name: benchmark.facts(BenchmarkFacts) for name, benchmark in benchmarks.items()},
        curves=read_curves(read_metrics(model.path / METRICS)),
        samples=read_samples(model.path / SAMPLES),
        anomalies=tuple(read_metrics(model.path / ANOMALIES)),
        measured=tuple(_measured(name, stage) for name, stage in baselines.items()),
        harness=harness.facts(HarnessFacts) if harness is not None else None,
        without_harness=directory.request.hints.get("without_harness"),
        recipe=_recipe(report.name),
    )


def _measured(name: str, stage: StageDir) -> Measured:
    facts = stage.facts(EvaluateFacts)
    return Measured(
        name=f"{name} (measured)",
        source=f"evaluated by this project on the same shard and benchmarks, {stage.request.address}",
        val_loss=facts.val_loss,
        scores=facts.scores,
    )


def _recipe(name: str) -> RunConfig | None:
    try:
        return load(name)
    except UserError:
        return None


def _benchmarks(model: StageDir, scores: StageDir) -> dict[str, StageDir]:
    """Name -> benchmark stage of the evaluation and of the training."""
    roles = [role for role in scores.request.inputs if role.startswith("benchmark:")]
    benchmarks = {role.removeprefix("benchmark:"): scores.input(role) for role in roles}
    during_training = model.config(TrainConfig).benchmark
    if during_training is not None:
        benchmarks.setdefault(during_training, model.input("benchmark"))
    return benchmarks


def _record(label: str, stage: StageDir) -> StageRecord:
    manifest = stage.manifest
    assert manifest is not None  # StageDir.input returns finished stages only
    path = stage.path / PROVENANCE
    provenance = read_model(path, Provenance) if path.exists() else None
    return StageRecord(label=label, request=stage.request, manifest=manifest, provenance=provenance)


def read_curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """Converts the lines of metrics.jsonl into curves.

    The last line of a repeated step counts: a killed run repeats steps. NaN, infinity and null are excluded.
    """
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in NOT_METRICS and (value is None or isinstance(value, int | float)):
                points.setdefault(name, {})[line["step"]] = math.nan if value is None else value
    curves = Curves()
    for name, by_step in points.items():
        finite = {step: by_step[step] for step in sorted(by_step) if math.isfinite(by_step[step])}
        curves.by_name[name] = Curve(tuple(finite), tuple(finite.values()))
        if len(finite) < len(by_step):
            curves.nonfinite[name] = len(by_step) - len(finite)
    return curves


def read_samples(path: Path) -> tuple[Sample, ...]:
    """The samples of a run, sorted by step; the last of a repeated step and prompt counts."""
    samples = {}
    for line in read_metrics(path):
        sample = Sample(line["step"], line["prompt"], line["text"])
        samples[sample.step, sample.prompt] = sample
    return tuple(sorted(samples.values(), key=lambda sample: sample.step))
