"""Stages as Prefect tasks.

The cache is manifest.json itself: a task whose stage is finished returns the manifest in a state named "Cached". A
copied store hits, a deleted or damaged directory misses, and no second record can disagree.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.states import Completed

from gpt2.config.runtime import Runtime
from gpt2.machine import gpu_count
from gpt2.plan import prepare
from gpt2.stage.directory import StageDir
from gpt2.stage.manifest import MANIFEST, METRICS, REQUEST, Damaged, Manifest, Request, confined, read_model
from gpt2.stage.table import STAGES
from tasks import launch
from tasks.gpu_locks import lock_gpus
from tasks.progress import Artifact, Bar, Display, LogLines, Watch


def run_stage(request: Request, runtime: Runtime, inputs: tuple[Manifest, ...] = ()) -> Manifest | State[Manifest]:
    """Run a stage's process on its directory.

    Args:
        inputs: manifests of the input stages, from which Prefect draws the dependencies.

    Returns:
        The manifest; in a state named "Cached" if the stage is finished already.

    Raises:
        StageFailed: the process failed.
        OtherVersion: another version of this project wrote the manifest.
    """
    if cached := cached_manifest(request, runtime):
        return Completed(name="Cached", data=cached)
    stage = STAGES[request.stage]
    logger = get_run_logger()
    directory = prepare(request, runtime)
    discard_damaged(directory, deep=runtime.verify)
    logger.info("%s", launch.shell_command(stage, directory, runtime))
    if stage.parallel and runtime.nodes > 1:
        logger.info("start the same command on each of the other %d nodes", runtime.nodes - 1)

    watch = Watch(directory / METRICS, _displays(request, logger), logger)
    finished = False
    gpus = gpu_count(runtime.gpus) if stage.parallel else 0
    holder = f"{request.address} in {runtime.store}"
    try:
        with lock_gpus(gpus, holder, logger.info) if gpus else nullcontext(()) as locks:
            launch.run(
                launch.command(stage, directory, runtime),
                directory=directory,
                env=launch.environment(stage, runtime),
                on_line=lambda line: logger.info("%s", line),
                on_tick=watch.update,
                keep_open=locks,
            )
        finished = True
    except launch.StageFailed as failed:
        raise type(failed)(f"{_short_name(request)}: {failed}") from None
    finally:
        watch.close(finished)
    if not (directory / MANIFEST).exists():
        raise launch.StageCrashed(f"{_short_name(request)}: exit status 0, but {directory / MANIFEST} does not exist")
    return read_model(directory / MANIFEST, Manifest)


def cached_manifest(request: Request, runtime: Runtime) -> Manifest | None:
    """The manifest of a finished stage that agrees with its request, files and inputs; None, with a warning, if not.

    Raises:
        OtherVersion: another version of this project wrote the manifest.
    """
    directory = runtime.store / request.address
    if not (directory / MANIFEST).exists() or not (directory / REQUEST).exists():
        return None
    try:
        manifest, stage = read_model(directory / MANIFEST, Manifest), StageDir(directory)
        problems = manifest.problems(directory, deep=runtime.verify)
        if stage.request.address != request.address:
            problems.append(f"{REQUEST} has the address {stage.request.address}")
        elif why := stage.outdated():
            problems.append(why)
    except Damaged as error:
        problems = [str(error)]
    if not problems:
        return manifest
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    get_run_logger().warning("running %s again: %s%s", request.address, problems[0], more)
    return None


def discard_damaged(directory: Path, *, deep: bool = False) -> None:
    """Delete a finished stage's manifest if a file differs from it, and the files that differ; the rest is resumed.

    Training keeps its files: it verifies checkpoints itself, and its metrics cannot be recomputed.

    Args:
        deep: hash every file, not only those whose size, times or inode changed.

    Raises:
        OtherVersion: another version wrote the manifest; nothing is removed.
        UserError: a file to remove lies outside of the directory, behind a link.
    """
    if not (directory / MANIFEST).exists():
        return
    with StageDir(directory).lock():
        try:
            manifest = read_model(directory / MANIFEST, Manifest)
        except Damaged:
            (directory / MANIFEST).unlink(missing_ok=True)
            return
        damaged = [
            entry
            for entry in manifest.files
            if manifest.model_copy(update={"files": (entry,)}).problems(directory, deep=deep)
        ]
        if damaged:
            paths = [confined(directory, entry.path) for entry in damaged]
            (directory / MANIFEST).unlink(missing_ok=True)
            stage, _, _ = manifest.address.partition("/")
            for path in () if STAGES[stage].checks_itself else paths:
                path.unlink(missing_ok=True)


def _displays(request: Request, logger: Any) -> list[Display]:
    name = _short_name(request)
    key = re.sub(r"[^a-z0-9-]", "-", f"progress-{name}".lower())
    return [Artifact(key, name, logger), Bar(name) if sys.stderr.isatty() else LogLines(logger)]


def _short_name(request: Request) -> str:
    stage, _, fingerprint = request.address.partition("/")
    return f"{stage} {fingerprint[:8]}"


def _has_crashed(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether to retry: a crash may be transient; an error for the user is not."""
    return isinstance(state.data, launch.StageCrashed) or isinstance(
        state.result(raise_on_failure=False), launch.StageCrashed
    )


class StageTask:
    """A stage that a flow calls: `shards = tokenize(request, runtime, corpus)`."""

    def __init__(self, stage: str, retries: int = 0) -> None:
        self._task = Task(
            run_stage,
            name=stage,
            tags=["gpt2"],
            retries=retries,
            retry_delay_seconds=5,
            retry_condition_fn=_has_crashed,
            cache_policy=NO_CACHE,
            persist_result=False,
        )

    def run_state(self, request: Request, runtime: Runtime, *inputs: Manifest, label: str = "") -> State[Manifest]:
        """Run the stage in this thread; the final state of its task run, named "Cached" if it was finished."""
        stage, _, fingerprint = request.address.partition("/")
        name = " ".join(part for part in (stage, label, fingerprint[:8]) if part)
        task: Any = self._task.with_options(task_run_name=name)
        state: State[Manifest] = task(request, runtime, inputs, return_state=True)
        return state

    def __call__(self, request: Request, runtime: Runtime, *inputs: Manifest, label: str = "") -> Manifest:
        """Run the stage in this thread, or return its manifest if it is finished.

        Args:
            label: distinguishes task runs of one stage, such as the benchmark's name.

        Raises:
            StageFailed: the stage's process failed.
        """
        return self.run_state(request, runtime, *inputs, label=label).result()


download = StageTask("download", retries=2)
tokenize = StageTask("tokenize", retries=1)
benchmark = StageTask("benchmark", retries=2)
pretrained = StageTask("pretrained", retries=2)
train = StageTask("train", retries=1)
evaluate = StageTask("evaluate", retries=1)
harness = StageTask("harness", retries=1)
report = StageTask("report", retries=1)
