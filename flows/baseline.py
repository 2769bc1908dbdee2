"""Evaluate a recipe's baselines: pretrained models, with the same code on the same shard and benchmarks.

    python -m flows.baseline 124m [field=value ...]

The recipe's report then includes them.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect import runtime as prefect_runtime
from prefect.logging import get_run_logger

from flows.reproduce import configure, from_command_line, name_flow_run, run_benchmarks
from gpt2.config.runtime import Runtime
from gpt2.console import command
from gpt2.errors import UserError, presentable
from gpt2.plan import plan_baseline
from gpt2.stage.facts import EvaluateFacts
from gpt2.stage.manifest import Manifest
from tasks.baseline import record_baseline
from tasks.stage import download, evaluate, pretrained, tokenize


@flow(name="gpt2-baseline", description=__doc__, persist_result=False)
def baseline(
    recipe: str = "124m",
    overrides: dict[str, Any] | None = None,
    runtime: str | None = None,
    store: str | None = None,
) -> dict[str, Manifest]:
    """Evaluate every baseline of a recipe.

    Args:
        recipe: name in conf/, or path of a .yaml file
        overrides: dotted fields of the recipe, e.g. {"evaluate.val_tokens": 1048576}
        runtime: name in conf/runtime/, or path; by default detected from the machine
        store: folder of all results; by default the runtime's
    """
    config, settings = configure(recipe, overrides, runtime, store)
    if not config.baselines:
        raise UserError(f"{config.name} has no baselines: name some under `baselines`")
    name_flow_run(prefect_runtime.flow_run.id, f"{config.name} baselines {' '.join(config.baselines)}")
    evaluations = {}
    for name in config.baselines:
        stages = plan_baseline(config, name, settings.store, verify=settings.verify)
        corpus = download(stages.download, settings)
        shards = tokenize(stages.tokenize, settings, corpus)
        benchmarks, skipped = run_benchmarks(config, stages, settings, list(stages.benchmarks), shards)
        if skipped:
            stages = plan_baseline(config, name, settings.store, skipped)
        model = pretrained(stages.pretrained, settings, label=name)
        evaluations[name] = evaluate(stages.evaluate, settings, model, shards, *benchmarks.values(), label=name)
        facts = evaluations[name].facts
        assert isinstance(facts, EvaluateFacts)
        scores = ", ".join(f"{benchmark} {score.figures()}" for benchmark, score in facts.scores.items())
        get_run_logger().info("%s: val loss %.4f over %s tokens; %s", name, facts.val_loss, facts.val_tokens, scores)
        try:
            record_baseline(config, name, stages, settings.store)
        except Exception as error:  # an MLflow error does not fail the flow
            message = "%s is not in MLflow (%s); run the same command again to retry"
            get_run_logger().warning(message, name, presentable(error))
    return evaluations


def _run(recipe: str, overrides: dict[str, Any], runtime: str | None, settings: Runtime) -> str:
    evaluations = baseline(recipe, overrides, runtime)
    paths = {name: settings.store / manifest.address / "scores.json" for name, manifest in evaluations.items()}
    return "\n".join(f"{name}  {path}" for name, path in paths.items())


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a recipe's baselines from the command line; the exit status."""
    return from_command_line("flows.baseline", "Evaluate a recipe's baselines.", _run, arguments)


if __name__ == "__main__":
    command(main)
