"""From a configuration to the requests of its stages: every address, before anything runs.

python -m gpt2.plan 124m [field=value ...]            what is to do, what is finished, where
python -m gpt2.plan 124m --write [field=value ...]    also write request.json and runtime.json, after which a stage
                                                      can be started by hand: python -m gpt2.tokenize DIRECTORY
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2.architecture import check_architecture
from gpt2.config.benchmarks import BenchmarkConfig, Continuation
from gpt2.config.recipe import load, load_runtime, parse_overrides
from gpt2.config.run import HarnessConfig, RunConfig
from gpt2.config.runtime import Runtime
from gpt2.config.section import Section
from gpt2.config.sources import LocalFiles, LocalModel, ModelSource
from gpt2.config.train import TrainConfig
from gpt2.console import command
from gpt2.download.sources import BENCHMARK_FORMATS, HARNESS_FORMATS, MODEL_FORMATS, identify, identify_weights
from gpt2.errors import UserError
from gpt2.stage.directory import is_finished
from gpt2.stage.manifest import REQUEST, RUNTIME, Request, write_model
from gpt2.stage.table import STAGES


class Plan(Section):
    """The requests of one run, in the order in which they can run."""

    download: Request
    tokenize: Request
    benchmarks: dict[str, Request]
    train: Request
    evaluate: Request
    harness: Request | None
    report: Request

    def requests(self) -> dict[str, Request]:
        """By a name for people: download, tokenize, benchmark-hellaswag, train, evaluate, harness, report."""
        named = {f"benchmark-{name}": request for name, request in self.benchmarks.items()}
        harness = {"harness": self.harness} if self.harness else {}
        return {"download": self.download, "tokenize": self.tokenize, **named,
                "train": self.train, "evaluate": self.evaluate, **harness, "report": self.report}  # fmt: skip


def plan(
    config: RunConfig,
    store: Path,
    skip: Mapping[str, str] | None = None,
    without_harness: str | None = None,
    *,
    verify: bool = False,
) -> Plan:
    """Work out every stage's request.

    Sources are identified by content, so local files are hashed here (once: the hashes are remembered in the store,
    by path, size, mtime, ctime and inode).

    Args:
        skip: optional benchmarks that turned out not to be had -> why. A plan without one asks for another evaluation
            than a plan with it, so that nothing is skipped any more once the data is there.
        without_harness: why the harness, though asked for, could not be run; likewise.
        verify: hash local files whether they are remembered or not (runtime.verify).

    Raises:
        UserError: a local file is missing; not where only an optional benchmark lacks it, unless training scores it.
            Or the harness is asked for and not installed.
    """
    identity, hints = identify(config.download.source, store, verify=verify)
    download = _request("download", {"source": identity}, hints={"source": hints})
    tokenize = _request("tokenize", config.tokenize, {"corpus": download.address})

    used = dict.fromkeys([*([config.train.benchmark] if config.train.benchmark else []), *config.evaluate.benchmarks])
    benchmarks, skipped = {}, dict(skip or {})
    for name in used:
        if name in skipped:
            continue
        try:
            benchmarks[name] = _benchmark(config.benchmarks[name], tokenize, store, verify)
        except UserError as error:
            if not config.benchmarks[name].optional or name == config.train.benchmark:
                raise
            skipped[name] = str(error)

    train_inputs = {"shards": tokenize.address}
    if config.train.benchmark:
        train_inputs["benchmark"] = benchmarks[config.train.benchmark].address
    train = _request("train", _with_weights(config.train, store, verify), train_inputs, {"recipe": config.name})

    scored = {
        f"benchmark:{name}": benchmarks[name].address for name in config.evaluate.benchmarks if name in benchmarks
    }
    evaluate = _request(
        "evaluate",
        config.evaluate,
        {"model": train.address, "shards": tokenize.address, **scored},
        {"skipped": skipped},
    )
    harness = (
        None if config.harness is None or without_harness else harness_request(config.harness, train, store, verify)
    )
    report = _request(
        "report",
        {"name": config.name, **config.report.identity()},
        {
            "shards": tokenize.address,
            "model": train.address,
            "scores": evaluate.address,
            **({"harness": harness.address} if harness else {}),
            **_measured_baselines(config, evaluate, store),
        },
        {"without_harness": without_harness} if without_harness else {},
    )
    return Plan(
        download=download,
        tokenize=tokenize,
        benchmarks=benchmarks,
        train=train,
        evaluate=evaluate,
        harness=harness,
        report=report,
    )


def harness_request(config: HarnessConfig, train: Request, store: Path, verify: bool = False) -> Request:
    """Running lm-evaluation-harness on what `train` makes. Another version of the harness is another measurement.

    Raises:
        UserError: the harness is not installed, or a file of its data is missing.
    """
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "harness: lm-evaluation-harness is not installed: pip install 'reproduce-gpt2[harness]', or harness=null"
        ) from None
    section, hints = config.identity() | {"version": version}, {}
    if config.data:
        paths_by_task = {task: str(Path(path).expanduser().absolute()) for task, path in config.data.items()}
        paths = sorted(set(paths_by_task.values()))
        section["source"], hints["source"] = identify(
            LocalFiles(paths=tuple(paths)), store, HARNESS_FORMATS, verify=verify
        )
        section["data"] = {task: paths.index(path) for task, path in paths_by_task.items()}
    return _request("harness", section, {"model": train.address}, hints)


class BaselinePlan(Section):
    """Requests to evaluate a published model on the shard and benchmarks of a recipe."""

    download: Request
    tokenize: Request
    benchmarks: dict[str, Request]
    pretrained: Request
    evaluate: Request

    def requests(self) -> dict[str, Request]:
        """By a name for people."""
        named = {f"benchmark-{name}": request for name, request in self.benchmarks.items()}
        return {"download": self.download, "tokenize": self.tokenize, **named,
                "pretrained": self.pretrained, "evaluate": self.evaluate}  # fmt: skip


def plan_baseline(
    config: RunConfig, name: str, store: Path, skip: Mapping[str, str] | None = None, *, verify: bool = False
) -> BaselinePlan:
    """Work out the requests of measuring `config.baselines[name]`; what it shares with `plan` has the same address.

    Raises:
        UserError: the recipe has no such baseline, or as `plan`.
    """
    if name not in config.baselines:
        raise UserError(
            f"{config.name} has no baseline {name!r}: baselines has {', '.join(config.baselines) or 'none'}"
        )
    ours = plan(config, store, skip, verify=verify)
    pretrained = _pretrained(config.baselines[name], store, verify)
    return BaselinePlan(
        download=ours.download,
        tokenize=ours.tokenize,
        benchmarks={n: r for n, r in ours.benchmarks.items() if n in config.evaluate.benchmarks},
        pretrained=pretrained,
        evaluate=_with_model(pretrained, ours.evaluate),
    )


def _pretrained(source: ModelSource, store: Path, verify: bool = False) -> Request:
    if isinstance(source, LocalModel):
        folder = Path(source.path).expanduser()
        pickled = not any(folder.glob("model*.safetensors")) and (folder / "pytorch_model.bin").exists()
        weights = "pytorch_model.bin" if pickled else "model*.safetensors*"
        identity, hints = identify(
            LocalFiles(paths=(str(folder / "config.json"), str(folder / weights))), store, MODEL_FORMATS, verify=verify
        )
        identity.pop("text_column")
    else:
        identity, hints = identify(source, store)
    return _request("pretrained", {"source": identity}, hints={"source": hints})


def _with_model(model: Request, evaluate: Request) -> Request:
    """The same evaluation of another model."""
    return evaluate.model_copy(update={"inputs": evaluate.inputs | {"model": model.address}})


def _measured_baselines(config: RunConfig, evaluate: Request, store: Path) -> dict[str, str]:
    """Role -> address of the evaluations of baselines that are finished: what the report can draw beside ours."""
    found = {}
    for name, source in config.baselines.items():
        with suppress(UserError):  # a folder that is gone was measured by nobody, or its figures are another folder's
            address = _with_model(_pretrained(source, store), evaluate).address
            if is_finished(store / address):
                found[f"baseline:{name}"] = address
    return found


def _with_weights(train: TrainConfig, store: Path, verify: bool) -> TrainConfig:
    """With the hash of the weights that training begins from, if from any; their architecture must be the recipe's."""
    if train.init_from is None:
        return train
    check_architecture(train.init_from, train.model)
    sha256 = identify_weights(train.init_from, store, verify=verify)
    if train.init_sha256 not in (None, sha256):
        raise UserError(
            f"train.init_from: {train.init_from} has the sha256 {sha256}, train.init_sha256 says {train.init_sha256}: "
            f"use those weights, or remove init_sha256"
        )
    return train.model_copy(update={"init_sha256": sha256})


def _benchmark(benchmark: BenchmarkConfig, tokenize: Request, store: Path, verify: bool) -> Request:
    section = benchmark.identity()
    del section["optional"]  # whether it may be missing changes no byte of it
    if isinstance(benchmark, Continuation):
        return _request("benchmark", section, {"shards": tokenize.address})
    section["source"], hints = identify(benchmark.source, store, BENCHMARK_FORMATS, verify=verify)
    return _request("benchmark", section, hints={"source": hints})


def _request(
    stage: str,
    section: Section | dict[str, Any],
    inputs: dict[str, str] | None = None,
    hints: dict[str, Any] | None = None,
) -> Request:
    config = section.identity() if isinstance(section, Section) else section
    return Request(stage=stage, version=STAGES[stage].version, config=config, inputs=inputs or {}, hints=hints or {})


def prepare(request: Request, runtime: Runtime) -> Path:
    """Create a stage's directory with request.json and runtime.json; returns its path."""
    directory = runtime.store / request.address
    write_model(directory / REQUEST, request)
    write_model(directory / RUNTIME, runtime)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.plan", description="The stages of a recipe.")
    parser.add_argument("recipe", help="name in conf/, or path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--write", action="store_true", help="write each stage's request.json and runtime.json")
    arguments = parser.parse_intermixed_args()
    overrides = parse_overrides(arguments.overrides)
    runtime = load_runtime(None, overrides)
    whole = plan(load(arguments.recipe, overrides), runtime.store, verify=runtime.verify)
    for name, request in whole.requests().items():
        directory = prepare(request, runtime) if arguments.write else runtime.store / request.address
        state = "finished" if is_finished(directory) else "to do"
        print(f"{name:24} {state:9} {directory}")


if __name__ == "__main__":
    command(main)
