"""What a report is about: one run, gathered from the directories of its stages.

Nothing is measured here. Facts come from manifests, curves from metrics.jsonl, and what was asked from request.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2.config.recipe import load
from gpt2.config.run import EvaluateConfig, Published, ReportConfig, RunConfig, TokenizeConfig
from gpt2.config.train import TrainConfig
from gpt2.errors import UserError
from gpt2.stage.directory import Provenance, StageDir
from gpt2.stage.manifest import (
    METRICS,
    PROVENANCE,
    BenchmarkFacts,
    DownloadFacts,
    EvaluateFacts,
    HarnessFacts,
    Manifest,
    Request,
    Score,
    TokenizeFacts,
    TrainFacts,
    read_model,
)
from gpt2.stage.metrics import NOT_METRICS, read_metrics

SAMPLES, ANOMALIES = "samples.jsonl", "anomalies.jsonl"


class ReportRequest(ReportConfig):
    """The report stage's section of the configuration: the recipe's name and its report section."""

    name: str


class Measured(Published):
    """A baseline: somebody else's model, measured as ours is."""

    scores: dict[str, Score] = {}
    """by benchmark"""


@dataclass(frozen=True)
class StageRecord:
    """One finished stage: what it was asked, what it made, where it ran."""

    label: str
    request: Request
    manifest: Manifest
    provenance: Provenance | None

    @property
    def bytes(self) -> int:
        """Of the files its manifest lists."""
        return sum(entry.size for entry in self.manifest.files)

    @property
    def seconds(self) -> float | None:
        """Wall time of the session that finished it."""
        return self.provenance.ended - self.provenance.started if self.provenance else None


@dataclass(frozen=True)
class Curve:
    """A metric over training; only finite values, in the order of steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass
class Curves:
    """Every metric of a metrics.jsonl by name."""

    by_name: dict[str, Curve] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    """name -> number of steps whose value was NaN or infinite"""

    def __getitem__(self, name: str) -> Curve:
        return self.by_name.get(name, Curve((), ()))


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Run:
    """Everything a report says something about."""

    address: str
    report: ReportRequest
    stages: tuple[StageRecord, ...]
    """download, tokenize, benchmarks, train, evaluate"""
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
    measured: tuple[Measured, ...] = ()
    """baselines, evaluated by the same code on the same shard and benchmarks"""
    harness: HarnessFacts | None = None
    """what lm-evaluation-harness itself measured, where it was asked for"""
    without_harness: str | None = None
    """why it could not be run, though it was asked for"""
    recipe: RunConfig | None = None
    """what conf/ holds under the run's name now; None where it holds nothing"""

    def stage(self, label: str) -> StageRecord:
        return next(stage for stage in self.stages if stage.label == label)

    @property
    def published(self) -> tuple[Published, ...]:
        """Other people's figures: those measured here first, then those only quoted."""
        return (*self.measured, *self.report.published)

    @property
    def device(self) -> str:
        """What trained, in words."""
        return self.train_facts.device if self.gpu_hours is not None else "the CPU"

    @property
    def hours(self) -> float:
        """Wall time of training over all its sessions, everything counted."""
        return self.train_facts.total_seconds / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Summed over sessions; None where only CPUs trained."""
        return self.train_facts.gpu_seconds / 3600 or None

    @property
    def dollars(self) -> float | None:
        """None where there is no price or no GPU to pay for."""
        if self.gpu_hours is None or not self.report.dollars_per_gpu_hour:
            return None
        return self.gpu_hours * self.report.dollars_per_gpu_hour

    @property
    def flops(self) -> float:
        """Of the whole training, by the formula behind `flops_per_token`."""
        return self.train_facts.tokens * self.train_facts.flops_per_token

    @property
    def epochs(self) -> float:
        return self.train_facts.tokens / self.tokenize_facts.train_tokens

    def tokens_at(self, step: int) -> int:
        """Tokens trained on after `step` optimizer steps: the batch never changes its size."""
        return step * self.train.total_batch_size


def gather(directory: StageDir) -> Run:
    """Read the run whose report `directory` is to hold.

    Raises:
        UserError: an input stage is not finished, or a record is not what this version writes.
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
        source=f"evaluated here by the same code on the same shard and benchmarks, {stage.request.address}",
        val_loss=facts.val_loss,
        scores=facts.scores,
    )


def _recipe(name: str) -> RunConfig | None:
    try:
        return load(name)
    except UserError:
        return None


def _benchmarks(model: StageDir, scores: StageDir) -> dict[str, StageDir]:
    """Name -> benchmark stage: those evaluated, and the one scored while training where it is another."""
    roles = [role for role in scores.request.inputs if role.startswith("benchmark:")]
    found = {role.removeprefix("benchmark:"): scores.input(role) for role in roles}
    while_training = model.config(TrainConfig).benchmark
    if while_training is not None:
        found.setdefault(while_training, model.input("benchmark"))
    return found


def _record(label: str, stage: StageDir) -> StageRecord:
    manifest = stage.manifest
    assert manifest is not None  # StageDir.input only gives finished stages
    path = stage.path / PROVENANCE
    provenance = read_model(path, Provenance) if path.exists() else None
    return StageRecord(label=label, request=stage.request, manifest=manifest, provenance=provenance)


def read_curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """Sort the lines of a metrics.jsonl into curves.

    A step that stands there twice (a run that was killed and went on before its file was cut) counts as it was last
    written. Values that are not finite (NaN, infinite, or null) are left out of the curve and counted.
    """
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in NOT_METRICS and (value is None or isinstance(value, int | float)):
                points.setdefault(name, {})[line["step"]] = math.nan if value is None else value
    curves = Curves()
    for name, by_step in points.items():
        finite = sorted((step, value) for step, value in by_step.items() if math.isfinite(value))
        curves.by_name[name] = Curve(tuple(step for step, _ in finite), tuple(value for _, value in finite))
        if len(finite) < len(by_step):
            curves.nonfinite[name] = len(by_step) - len(finite)
    return curves


def read_samples(path: Path) -> tuple[Sample, ...]:
    """The text samples of a run by step; of one that a resumed run wrote again, the last counts."""
    samples = {}
    for line in read_metrics(path):
        sample = Sample(line["step"], line["prompt"], line["text"])
        samples[sample.step, sample.prompt] = sample
    return tuple(sorted(samples.values(), key=lambda sample: sample.step))
