"""How to have the same run again: the configuration behind its addresses, and the command that asks for it."""

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
    """What the run was asked, as a conf/<name>.yaml holds it. What no stage was asked is as in the recipe: benchmarks
    that were not scored, and which of them are optional."""
    benchmarks: dict[str, Any] = run.recipe.model_dump(mode="json")["benchmarks"] if run.recipe else {}
    for name in run.benchmarks:
        request = run.stage(f"benchmark-{name}").request
        section = dict(request.config)
        if "source" in section:
            section["source"] = _source(request)
        # the request leaves some defaults out, which the recipe's values must not fill
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
    """Dotted field -> value, wherever the run was asked something else than its recipe says; empty without a recipe."""
    return dict(differences(run.recipe.model_dump(mode="json"), configuration(run))) if run.recipe else {}


def command(run: Run) -> str:
    """Lines for a shell at the root of the repository."""
    provenance = run.stage("train").provenance
    lines = []
    if provenance is not None and provenance.commit is not None:
        lines.append(f"git checkout {provenance.commit.removesuffix('+')}")
    if run.recipe is None:
        lines.append(f"make reproduce CONF={run.report.name}.yaml   # the configuration below, saved under this name")
    elif changed := departures(run):
        lines.append("make install")
        given = [shlex.quote(f"{field}={_yaml_value(value)}") for field, value in changed.items()]
        lines.append(" \\\n    ".join([f".venv/bin/python -m flows.reproduce {run.report.name}", *given]))
    else:
        lines.append("make demo" if run.report.name == "demo" else f"make reproduce CONF={run.report.name}")
    return "\n".join(lines)


def _source(request: Request) -> dict[str, Any]:
    """A source as a configuration says it: the identity has hashes where a configuration has paths."""
    source: dict[str, Any] = request.hints["source"]["source"]
    return source


def differences(recipe: Any, run: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) wherever `run` differs from `recipe`."""
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
