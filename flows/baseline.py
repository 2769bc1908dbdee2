"""The models that a recipe is compared with, measured by the same code on the same shard and benchmarks.

    python -m flows.baseline 124m [field=value ...]

The recipe's report draws its lines from them once they are measured.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect import runtime as prefect_runtime
from prefect.logging import get_run_logger

from flows.reproduce import configure, from_command_line, make_benchmarks, name_flow_run
from gpt2.config.runtime import Runtime
from gpt2.console import command
from gpt2.errors import UserError, presentable
from gpt2.plan import plan_baseline
from gpt2.stage.manifest import EvaluateFacts, Manifest
from tasks.baseline import record
from tasks.stage import download, evaluate, pretrained, tokenize


@flow(name="gpt2-baseline", description=__doc__, persist_result=False)
def baseline(
    recipe: str = "124m",
    overrides: dict[str, Any] | None = None,
    runtime: str | None = None,
    store: str | None = None,
) -> dict[str, Manifest]:
    """Measure every baseline of a recipe.

    Args:
        recipe: name in conf/, or path of a .yaml file
        overrides: dotted fields of the recipe, e.g. {"evaluate.val_tokens": 1048576}
        runtime: name in conf/runtime/, or path; by default everything is found by looking at the machine
        store: folder of all results; by default the runtime's
    """
    config, how = configure(recipe, overrides, runtime, store)
    if not config.baselines:
        raise UserError(f"{config.name} has no baselines: name some under `baselines`")
    name_flow_run(prefect_runtime.flow_run.id, f"{config.name} baselines {' '.join(config.baselines)}")
    measured = {}
    for name in config.baselines:
        steps = plan_baseline(config, name, how.store, verify=how.verify)
        corpus = download(steps.download, how)
        shards = tokenize(steps.tokenize, how, corpus)
        made, skipped = make_benchmarks(config, steps, how, list(steps.benchmarks), shards)
        if skipped:
            steps = plan_baseline(config, name, how.store, skipped)
        model = pretrained(steps.pretrained, how, label=name)
        measured[name] = evaluate(steps.evaluate, how, model, shards, *made.values(), label=name)
        facts = measured[name].facts
        assert isinstance(facts, EvaluateFacts)
        scores = ", ".join(f"{benchmark} {score.figures()}" for benchmark, score in facts.scores.items())
        get_run_logger().info("%s: val loss %.4f over %s tokens; %s", name, facts.val_loss, facts.val_tokens, scores)
        try:
            record(config, name, steps, how.store)
        except Exception as error:  # the tracking server's troubles are not the measurement's
            get_run_logger().warning("MLflow has not got %s (%s); the same command sends it", name, presentable(error))
    return measured


def _run(recipe: str, overrides: dict[str, Any], runtime: str | None, how: Runtime) -> str:
    measured = baseline(recipe, overrides, runtime)
    return "\n".join(f"{name}  {how.store / manifest.address / 'scores.json'}" for name, manifest in measured.items())


def main(arguments: list[str] | None = None) -> int:
    """Measure a recipe's baselines from the command line; the exit status."""
    return from_command_line("flows.baseline", "Measure a recipe's baselines.", _run, arguments)


if __name__ == "__main__":
    command(main)
