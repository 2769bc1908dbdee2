"""Train a GPT-2 from a recipe: download, tokenize, train, evaluate, report.

    python -m flows.reproduce 124m [train.optim.max_lr=3e-4 runtime.gpus=4 ...]

After an interruption run it again: finished stages are cached, the others resume.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from prefect import flow
from prefect import runtime as prefect_runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger

from flows import services
from gpt2.config.recipe import load, load_runtime, parse_overrides
from gpt2.config.run import RunConfig
from gpt2.config.runtime import Runtime
from gpt2.config.section import Section
from gpt2.console import command
from gpt2.errors import REFUSED, UserError, presentable, without_credentials
from gpt2.plan import BaselinePlan, Plan, plan
from gpt2.stage.directory import is_finished
from gpt2.stage.manifest import Manifest
from tasks import registry
from tasks.launch import StageCrashed, StageFailed
from tasks.mlflow_runs import import_mlflow
from tasks.mlflow_sync import MlflowRunSync
from tasks.stage import benchmark, download, evaluate, harness, report, tokenize, train
from tasks.tracking import Tracking


class Outcome(Section):
    """The report's manifest, and the run's address on MLflow's and Prefect's pages."""

    report: Manifest
    mlflow: str | None
    """fragment of the run's address on an MLflow page; None if MLflow was unreachable"""
    flow_run: str


@flow(name="reproduce-gpt2", description=__doc__, persist_result=False)
def reproduce(
    recipe: str = "demo",
    overrides: dict[str, Any] | None = None,
    runtime: str | None = None,
    store: str | None = None,
) -> Outcome:
    """Run a recipe.

    Args:
        recipe: name in conf/, or path of a .yaml file
        overrides: dotted fields of the recipe, e.g. {"train.optim.max_lr": 0.001}; the runtime's begin with "runtime."
        runtime: name in conf/runtime/, or path; by default detected from the machine
        store: folder of all results; by default the runtime's
    """
    config, settings = configure(recipe, overrides, runtime, store)
    stages = plan(config, settings.store, verify=settings.verify)
    flow_run = prefect_runtime.flow_run.id
    name_flow_run(flow_run, f"{config.name} {stages.train.address}")

    mlflow_run = MlflowRunSync(config, stages, settings.store, prefect_tags(flow_run))
    busy = not all(is_finished(settings.store / request.address) for request in stages.requests().values())
    with Tracking(mlflow_run, busy=busy):
        corpus = download(stages.download, settings)
        independent = [name for name, request in stages.benchmarks.items() if not request.inputs]
        # before tokenize: a missing benchmark fails early
        benchmarks, skipped = run_benchmarks(config, stages, settings, independent)
        shards = tokenize(stages.tokenize, settings, corpus)
        dependent = [name for name in stages.benchmarks if name not in independent]
        more, skipped_more = run_benchmarks(config, stages, settings, dependent, shards)
        benchmarks |= more
        skipped |= skipped_more
        if skipped:
            mlflow_run.plan = stages = plan(config, settings.store, skipped)
        train_benchmarks = [benchmarks[config.train.benchmark]] if config.train.benchmark else []
        model = train(stages.train, settings, shards, *train_benchmarks)
        scores = evaluate(stages.evaluate, settings, model, shards, *benchmarks.values())
        harness_scores: list[Manifest] = []
        if stages.harness:
            try:
                harness_scores = [harness(stages.harness, settings, model)]
            except StageFailed as error:
                get_run_logger().warning("skipping lm-evaluation-harness: %s", error)
                mlflow_run.plan = stages = plan(config, settings.store, skipped, str(error))
        report_manifest = report(stages.report, settings, shards, model, scores, *harness_scores)
    _register(config, stages, settings, mlflow_run)
    _create_artifacts(config, settings.store / stages.report.address, mlflow_run)
    return Outcome(
        report=report_manifest, mlflow=mlflow_run.fragment if mlflow_run.run_id else None, flow_run=str(flow_run)
    )


def configure(
    recipe: str, overrides: dict[str, Any] | None, runtime: str | None, store: str | None
) -> tuple[RunConfig, Runtime]:
    """Load the recipe and the runtime settings.

    Raises:
        UserError: a value is not valid; the text names the field. Or the store is not writable.
    """
    overrides = dict(overrides or {})
    if store:
        overrides["runtime.store"] = store
    config, settings = load(recipe, overrides), load_runtime(runtime, overrides)
    try:
        settings.store.mkdir(parents=True, exist_ok=True)
        writable = os.access(settings.store, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(
            f"the store {settings.store} cannot be written: change the folder that holds it, or give "
            f"runtime.store=FOLDER"
        )
    return config, settings


def run_benchmarks(
    config: RunConfig, stages: Plan | BaselinePlan, settings: Runtime, names: list[str], *inputs: Manifest
) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Run the benchmark stages: name -> manifest, and name -> error of optional benchmarks that failed."""
    manifests, skipped = {}, {}
    for name in names:
        try:
            manifests[name] = benchmark(stages.benchmarks[name], settings, *inputs, label=name)
        except StageFailed as error:
            if not config.benchmarks[name].optional or name == config.train.benchmark:
                raise
            get_run_logger().warning("skipping benchmark %s: %s", name, error)
            skipped[name] = str(error)
    return manifests, skipped


# ------------------------------------------------------------------------------------------- names, links, artifacts


def name_flow_run(flow_run: Any, name: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run, name=name)


def prefect_tags(flow_run: Any) -> dict[str, str]:
    """Tags of the MLflow run: ID and page of the flow run."""
    return {
        "prefect.flow_run_id": str(flow_run),
        "prefect.flow_run": without_credentials(prefect_runtime.flow_run.ui_url or ""),
    }


def _register(config: RunConfig, stages: Plan, settings: Runtime, mlflow_run: MlflowRunSync) -> None:
    """Register the model in MLflow; an error there does not fail the flow."""
    if mlflow_run.run_id is None:
        return
    logger = get_run_logger()
    train, evaluate = (settings.store / request.address for request in (stages.train, stages.evaluate))
    try:
        registry.register(
            mlflow_run.run_id, config.name, train, evaluate, mlflow_run.uri,
            upload_seconds=settings.upload_seconds, on_line=logger.info,
        )  # fmt: skip
    except Exception as error:
        logger.warning(
            "the model is not registered in MLflow (%s); run the same command again to retry", presentable(error)
        )


def _create_artifacts(config: RunConfig, directory: Path, mlflow_run: MlflowRunSync) -> None:
    """Artifacts of the flow run: the report, and a link to the MLflow run if it has a page."""
    text = (directory / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\]\(.*\)\s*$", "", text, flags=re.MULTILINE)  # Prefect's page cannot show local images
    create_markdown_artifact(
        key=f"report-{config.name}", markdown=f"With its plots: `{directory / 'report.html'}`\n\n{text}",
        description=f"Report of {config.name}",
    )  # fmt: skip
    if mlflow_run.page:
        create_link_artifact(key=f"mlflow-{config.name}", link=mlflow_run.page, link_text="MLflow run")


class _ShortErrors(logging.Filter):
    """Drops tracebacks of errors for the user, and Prefect's "View at" line, which `run_summary` replaces."""

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("View at "):
            return False
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, StageFailed | UserError) or (isinstance(error, OSError) and error.errno in REFUSED):
            record.exc_info = None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_ShortErrors())


# ---------------------------------------------------------------------------------------------------- command line


class Terminated(BaseException):
    """Raised by SIGTERM."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe from the command line; the exit status."""
    return from_command_line("flows.reproduce", "Run a recipe.", _run, arguments)


def _run(recipe: str, overrides: dict[str, Any], runtime: str | None, settings: Runtime) -> str:
    outcome = reproduce(recipe, overrides, runtime)
    return services.run_summary(settings.store, outcome.report.address, outcome.mlflow, outcome.flow_run)


def from_command_line(
    module: str,
    description: str,
    run: Callable[[str, dict[str, Any], str | None, Runtime], str],
    arguments: list[str] | None,
) -> int:
    """Parse a recipe and overrides, run a flow with them, print the text that it returns; the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("recipe", help="name in conf/, or path of a .yaml file")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="e.g. train.optim.max_lr=3e-4 runtime.gpus=4"
    )
    parser.add_argument("--runtime", help="name in conf/runtime/, or path of a .yaml file")
    options = parser.parse_intermixed_args(arguments)
    again = "run the same command again to continue"
    signal.signal(signal.SIGTERM, _terminate)  # Prefect's handler ends the stage, then calls this one
    try:
        threading.Thread(target=import_mlflow, daemon=True).start()  # while the server starts
        overrides = parse_overrides(options.overrides)
        config, settings = configure(options.recipe, overrides, options.runtime, None)
        plan(config, settings.store)  # report errors in it before starting a server
        services.connect(settings.store)
        summary = run(options.recipe, overrides, options.runtime, settings)
    except StageCrashed as error:
        return _stopped(f"error: {error}; {again}", 1)
    except (StageFailed, UserError) as error:
        return _stopped(f"error: {error}", 2)
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return _stopped(f"error: Prefect's server fails: {reason}; {again}", 1)
    except KeyboardInterrupt:
        return _stopped(f"stopped; {again}", 130)
    except Terminated:
        return _stopped(f"stopped by SIGTERM; {again}", 143)
    print(summary, flush=True)
    return 0


def _stopped(message: str, status: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    command(main)
