"""From nothing to a trained GPT-2 and a report on it.

    python -m flows.reproduce 124m [train.optim.max_lr=3e-4 runtime.gpus=4 ...]

Run it again after anything has stopped it: finished stages are found finished, the others go on where they were.
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
from tasks.mlflow_runs import preload
from tasks.mlflow_sync import Mirror
from tasks.stage import benchmark, download, evaluate, harness, report, tokenize, train
from tasks.tracking import Tracking


class Outcome(Section):
    """What a run leaves: the report's manifest, and where the run is to be found on the two pages."""

    report: Manifest
    mlflow: str | None
    """fragment of the run's address on an MLflow page; None if MLflow was never reached"""
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
        runtime: name in conf/runtime/, or path; by default everything is found by looking at the machine
        store: folder of all results; by default the runtime's
    """
    config, how = configure(recipe, overrides, runtime, store)
    steps = plan(config, how.store, verify=how.verify)
    flow_run = prefect_runtime.flow_run.id
    name_flow_run(flow_run, f"{config.name} {steps.train.address}")

    mirror = Mirror(config, steps, how.store, links(flow_run))
    busy = not all(is_finished(how.store / request.address) for request in steps.requests().values())
    with Tracking(mirror, busy=busy):
        corpus = download(steps.download, how)
        independent = [name for name, request in steps.benchmarks.items() if not request.inputs]
        # first: what cannot be had is better known early
        made, skipped = make_benchmarks(config, steps, how, independent)
        shards = tokenize(steps.tokenize, how, corpus)
        dependent = [name for name in steps.benchmarks if name not in independent]
        more, skipped_more = make_benchmarks(config, steps, how, dependent, shards)
        made |= more
        skipped |= skipped_more
        if skipped:
            mirror.plan = steps = plan(config, how.store, skipped)
        scored_in_training = [made[config.train.benchmark]] if config.train.benchmark else []
        model = train(steps.train, how, shards, *scored_in_training)
        scores = evaluate(steps.evaluate, how, model, shards, *made.values())
        judged: list[Manifest] = []
        if steps.harness:
            try:
                judged = [harness(steps.harness, how, model)]
            except StageFailed as error:
                get_run_logger().warning("lm-evaluation-harness is left out: %s", error)
                mirror.plan = steps = plan(config, how.store, skipped, str(error))
        page = report(steps.report, how, shards, model, scores, *judged)
    _register(config, steps, how, mirror)
    _show_report(config, how.store / steps.report.address, mirror)
    return Outcome(report=page, mlflow=mirror.fragment if mirror.run_id else None, flow_run=str(flow_run))


def configure(
    recipe: str, overrides: dict[str, Any] | None, runtime: str | None, store: str | None
) -> tuple[RunConfig, Runtime]:
    """What is to be run, and how.

    Raises:
        UserError: one of them is not valid; the text names the field. Or the store cannot be written.
    """
    overrides = dict(overrides or {})
    if store:
        overrides["runtime.store"] = store
    config, how = load(recipe, overrides), load_runtime(runtime, overrides)
    place = next(path for path in (how.store, *how.store.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"the store {how.store} cannot be written: change {place}, or give runtime.store=FOLDER")
    return config, how


def make_benchmarks(
    config: RunConfig, steps: Plan | BaselinePlan, how: Runtime, names: list[str], *inputs: Manifest
) -> tuple[dict[str, Manifest], dict[str, str]]:
    """Make the named benchmarks: name -> manifest, and name -> why of optional ones that could not be had."""
    made, skipped = {}, {}
    for name in names:
        try:
            made[name] = benchmark(steps.benchmarks[name], how, *inputs, label=name)
        except StageFailed as error:
            if not config.benchmarks[name].optional or name == config.train.benchmark:
                raise
            get_run_logger().warning("benchmark %s is left out: %s", name, error)
            skipped[name] = str(error)
    return made, skipped


# ------------------------------------------------------------------------------------------- names, links, artifacts


def name_flow_run(flow_run: Any, name: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run, name=name)


def links(flow_run: Any) -> dict[str, str]:
    """Tags that lead from MLflow to the flow run."""
    return {
        "prefect.flow_run_id": str(flow_run),
        "prefect.flow_run": without_credentials(prefect_runtime.flow_run.ui_url or ""),
    }


def _register(config: RunConfig, steps: Plan, how: Runtime, mirror: Mirror) -> None:
    """Put the model into MLflow's registry; what is wrong with MLflow is not wrong with the run."""
    if mirror.run_id is None:
        return
    logger = get_run_logger()
    train, evaluate = (how.store / request.address for request in (steps.train, steps.evaluate))
    try:
        registry.register(
            mirror.run_id, config.name, train, evaluate, mirror.uri,
            upload_seconds=how.upload_seconds, on_line=logger.info,
        )  # fmt: skip
    except Exception as error:
        logger.warning("the model is not in MLflow's registry (%s); the same command tries again", presentable(error))


def _show_report(config: RunConfig, directory: Path, mirror: Mirror) -> None:
    """The report as an artifact of the flow run, and a link to the MLflow run where that has an address."""
    text = (directory / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\]\(.*\)\s*$", "", text, flags=re.MULTILINE)  # the page cannot show the store's pictures
    create_markdown_artifact(
        key=f"report-{config.name}", markdown=f"With its plots: `{directory / 'report.html'}`\n\n{text}",
        description=f"Report of {config.name}",
    )  # fmt: skip
    if mirror.page:
        create_link_artifact(key=f"mlflow-{config.name}", link=mirror.page, link_text="MLflow run")


class _OneLine(logging.Filter):
    """An error that says what to do needs no traceback of the machinery that carried it here; and the page of a run
    is told of at its end, when it is known whether there is one."""

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("View at "):
            return False
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, StageFailed | UserError) or (isinstance(error, OSError) and error.errno in REFUSED):
            record.exc_info = None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_OneLine())


# ---------------------------------------------------------------------------------------------------- command line


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe from the command line; the exit status."""
    return from_command_line("flows.reproduce", "Run a recipe.", _run, arguments)


def _run(recipe: str, overrides: dict[str, Any], runtime: str | None, how: Runtime) -> str:
    outcome = reproduce(recipe, overrides, runtime)
    return services.where(how.store, outcome.report.address, outcome.mlflow, outcome.flow_run)


def from_command_line(
    module: str,
    description: str,
    run: Callable[[str, dict[str, Any], str | None, Runtime], str],
    arguments: list[str] | None,
) -> int:
    """Read a recipe and overrides, run a flow on them, print what it returns; the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("recipe", help="name in conf/, or path of a .yaml file")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="e.g. train.optim.max_lr=3e-4 runtime.gpus=4"
    )
    parser.add_argument("--runtime", help="name in conf/runtime/, or path of a .yaml file")
    given = parser.parse_intermixed_args(arguments)
    again = "run the same command again to go on"
    signal.signal(signal.SIGTERM, _terminate)  # Prefect's own handler ends the stage, then hands it on to this one
    try:
        threading.Thread(target=preload, daemon=True).start()  # while the server starts there is time
        overrides = parse_overrides(given.overrides)
        config, how = configure(given.recipe, overrides, given.runtime, None)
        plan(config, how.store)  # what is wrong with it is better said before anything is started
        services.connect(how.store)
        last_words = run(given.recipe, overrides, given.runtime, how)
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
    print(last_words, flush=True)
    return 0


def _stopped(message: str, status: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    command(main)
