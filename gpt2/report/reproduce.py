"""Reproduction of a run: its complete configuration, and the command with its overrides."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter

from gpt2.config import strict_yaml
from gpt2.config.benchmarks import BenchmarkConfig
from gpt2.report.run import Run
from gpt2.stage.manifest import Request

BENCHMARK: TypeAdapter[BenchmarkConfig] = TypeAdapter(BenchmarkConfig)


def configuration(run: Run) -> dict[str, Any]:
    """The run's configuration as in conf/<name>.yaml.

    Benchmarks that were not scored and the fields `optional` come from the recipe.
    """
    benchmarks: dict[str, Any] = run.recipe.model_dump(mode="json")["benchmarks"] if run.recipe else {}
    for name in run.benchmarks:
        request = run.stage(f"benchmark-{name}").request
        section = dict(request.config)
        if "source" in section:
            section["source"] = _source(request)
        # adds defaults that the request omits, so that the recipe's values do not replace them
        section = BENCHMARK.validate_python(section).model_dump(mode="json", exclude={"optional"})
        benchmarks[name] = {**benchmarks.get(name, {}), **section}
    return {
        "name": run.report.name,
        "download": {"source": _source(run.stage("download").request)},
        "tokenize": run.tokenize.model_dump(mode="json"),
        "benchmarks": benchmarks,
        "train": run.train.model_dump(mode="json"),
        "evaluate": run.evaluate.model_dump(mode="json"),
        **_harness(run),
        "report": run.report.model_dump(mode="json", exclude={"name"}),
    }


def _harness(run: Run) -> dict[str, Any]:
    if run.harness is None:
        return {}
    request = run.stage("harness").request
    paths = request.hints["source"]["paths"] if request.config["data"] else []
    data = {task: paths[index] for task, index in request.config["data"].items()}
    return {"harness": {"tasks": request.config["tasks"], "data": data, "limit": request.config["limit"]}}


def departures(run: Run) -> dict[str, Any]:
    """Dotted field -> value where the run differs from its recipe; empty without a recipe."""
    return dict(differences(run.recipe.model_dump(mode="json"), configuration(run))) if run.recipe else {}


def command(run: Run) -> str:
    """Shell commands for the root of the repository."""
    provenance = run.stage("train").provenance
    lines = []
    if provenance is not None and provenance.commit is not None:
        lines.append(f"git checkout {provenance.commit.removesuffix('+')}")
    if run.recipe is None:
        lines.append(f"make reproduce CONF={run.report.name}.yaml   # the configuration below, saved under this name")
    elif departed := departures(run):
        lines.append("make install")
        overrides = [shlex.quote(f"{field}={_yaml_value(value)}") for field, value in departed.items()]
        lines.append(" \\\n    ".join([f".venv/bin/python -m flows.reproduce {run.report.name}", *overrides]))
    else:
        lines.append("make demo" if run.report.name == "demo" else f"make reproduce CONF={run.report.name}")
    return "\n".join(lines)


def _source(request: Request) -> dict[str, Any]:
    """A source as in a configuration; the request's identity has hashes instead of paths."""
    source: dict[str, Any] = request.hints["source"]["source"]
    return source


def differences(recipe: Any, run: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) where `run` differs from `recipe`."""
    both = isinstance(recipe, dict) and isinstance(run, dict)
    if both and recipe.get("kind") == run.get("kind"):
        for key in run:
            yield from differences(recipe.get(key), run[key], f"{path}.{key}" if path else key)
    elif recipe != run:
        yield path, run


def _yaml_value(value: Any) -> str:
    if isinstance(value, str):
        with suppress(ValueError):
            if strict_yaml.load(value) == value:
                return value
    return json.dumps(value, ensure_ascii=False)
