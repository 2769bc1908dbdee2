"""The one factory: a stage of the library as a Prefect task.

Prefect's cache is asked under the stage's address, and what it answers is read from manifest.json itself: a store
that was copied elsewhere hits, a directory that was deleted or damaged is made again, and there is no second record
that could disagree.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.filesystems import WritableFileSystem
from prefect.logging import get_logger, get_run_logger
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import JSONSerializer
from pydantic import PrivateAttr

from gpt2.atomic import atomic_write
from gpt2.config.runtime import Runtime
from gpt2.machine import gpu_names
from gpt2.plan import prepare
from gpt2.stage.directory import StageDir
from gpt2.stage.manifest import MANIFEST, METRICS, REQUEST, Damaged, Manifest, Request, confined, read_model
from gpt2.stage.table import STAGES
from tasks import launch
from tasks.gpu_locks import gpus_held
from tasks.progress import Artifact, Bar, Display, LogLines, Watch

RESULTS = Path(".prefect") / "results"


# -------------------------------------------------------------------------------------------------------- the cache


@dataclass
class StageAddress(CachePolicy):
    """The cache key of a task run is the address of the stage it was asked for; how it is run has no part in it."""

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        request: Request = inputs["request"]
        return request.address


class ManifestKeys(WritableFileSystem):
    """Key storage of a cache policy that remembers nothing: a key is there when <store>/<key>/manifest.json is and
    agrees with the files. The result that Prefect then reads is made anew from that manifest.

    An exception in `read_path` is a miss for Prefect, which then runs the task under the same key.
    """

    _block_type_name = "Manifests of a store"
    _block_type_slug = "gpt2-manifests"

    store: Path
    deep: bool = False
    """hash every file, not only those touched since"""
    _checked: set[str] = PrivateAttr(default_factory=set)

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]  # Prefect calls it so
        """The metadata of the result under key `path`."""
        directory = self.store / path
        manifest = read_model(directory / MANIFEST, Manifest)
        if path not in self._checked:  # Prefect reads a key twice, to see that it is there and for what it says
            stage = StageDir(directory)  # without request.json: the task writes it and finds the stage finished
            if stage.request.address != path:
                raise ValueError(f"{stage.path / REQUEST} asks for {stage.request.address}")
            problems = [*manifest.problems(directory, deep=self.deep), *filter(None, [stage.outdated()])]
            if problems:
                more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
                get_logger("stages").warning("%s is made again: %s%s", path, problems[0], more)
                raise ValueError(problems[0])
            self._checked.add(path)
        result = (self.store / RESULTS).resolve() / path
        record = ResultRecord(
            result=manifest,
            metadata=ResultRecordMetadata(storage_key=str(result), serializer=JSONSerializer()),
        )
        content = record.serialize_result()
        if not result.is_file() or result.read_bytes() != content:  # a full disk does not turn a hit into a miss
            with atomic_write(result) as file:
                file.write(content)
        return record.serialize_metadata()

    async def aread_path(self, path: str) -> bytes:
        return self.read_path(path)

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> None:  # type: ignore[override]
        """Nothing: the stage has written manifest.json."""

    async def awrite_path(self, path: str, content: bytes) -> None:
        """Nothing."""


# --------------------------------------------------------------------------------------------------------- the task


def run_stage(request: Request, runtime: Runtime, inputs: tuple[Manifest, ...] = ()) -> Manifest:
    """Run a stage's process on its directory, unless the directory is finished; its manifest.

    Args:
        inputs: manifests of the stages that come before, which make the arrows on Prefect's page.

    Raises:
        StageFailed: the process did not end well.
    """
    stage = STAGES[request.stage]
    logger = get_run_logger()
    directory = prepare(request, runtime)
    discard_damaged(directory, deep=runtime.verify)
    logger.info("%s", launch.typed(stage, directory, runtime))
    if stage.parallel and runtime.nodes > 1:
        logger.info("start the same command on each of the other %d nodes", runtime.nodes - 1)

    watch = Watch(directory / METRICS, _displays(request, logger), logger)
    finished = False
    gpus = launch.processes(stage, runtime) if stage.parallel and runtime.gpus != 0 and gpu_names() else 0
    what = f"{request.address} in {runtime.store}"
    try:
        with gpus_held(gpus, what, logger.info) if gpus else nullcontext(()) as locks:
            launch.run(
                launch.command(stage, directory, runtime),
                env=launch.environment(stage, runtime),
                on_line=lambda line: logger.info("%s", line),
                on_tick=watch.look,
                keep_open=locks,
            )
        finished = True
    except launch.StageFailed as failed:
        raise type(failed)(f"{_short(request)}: {failed}") from None
    finally:
        watch.close(finished)
    if not (directory / MANIFEST).exists():
        raise launch.StageCrashed(f"{_short(request)}: it ended without an error and without {directory / MANIFEST}")
    return read_model(directory / MANIFEST, Manifest)


def _displays(request: Request, logger: Any) -> list[Display]:
    short = _short(request)
    key = re.sub(r"[^a-z0-9-]", "-", f"progress-{short}".lower())
    artifact = Artifact(key, short, logger)
    return [artifact, Bar(short) if sys.stderr.isatty() else LogLines(logger)]


def discard_damaged(directory: Path, *, deep: bool = False) -> None:
    """Remove a finished stage's manifest if it does not agree with the files, and the files that are not what it
    says; what is left is resumed like any unfinished work. Training keeps its files: it verifies checkpoints itself,
    and its records cannot be made again.

    Raises:
        OtherVersion: another version wrote the manifest, which stays, as does all that it lists.
        UserError: a file to be removed lies outside of the directory, behind a link.
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


def _worth_retrying(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """A crash may have been the network's or the machine's; an error the user has to put right comes again."""
    return isinstance(state.data, launch.StageCrashed) or isinstance(
        state.result(raise_on_failure=False), launch.StageCrashed
    )


def _short(request: Request) -> str:
    stage, _, fingerprint = request.address.partition("/")
    return f"{stage} {fingerprint[:8]}"


class StageTask:
    """A stage as something a flow calls: `shards = tokenize(request, runtime, corpus)`."""

    def __init__(self, stage: str, retries: int = 0) -> None:
        self._task = Task(
            run_stage,
            name=stage,
            tags=["gpt2"],
            retries=retries,
            retry_delay_seconds=5,
            retry_condition_fn=_worth_retrying,
            result_serializer="json",
            persist_result=True,
            cache_result_in_memory=False,
        )

    def bound(self, request: Request, runtime: Runtime, label: str = "") -> Task[..., Manifest]:
        """The task for one request: named after it, and cached under its address in the runtime's store."""
        stage, _, fingerprint = request.address.partition("/")
        return self._task.with_options(
            task_run_name=" ".join(part for part in (stage, label, fingerprint[:8]) if part),
            cache_policy=StageAddress(key_storage=ManifestKeys(store=runtime.store, deep=runtime.verify)),
            result_storage=runtime.store / RESULTS,
        )

    def __call__(self, request: Request, runtime: Runtime, *inputs: Manifest, label: str = "") -> Manifest:
        """Run the stage in this thread, or find it finished.

        Args:
            label: what tells this run from others of the same stage, such as the benchmark's name.

        Raises:
            StageFailed: the stage's process did not end well.
        """
        return self.bound(request, runtime, label)(request, runtime, inputs)


download = StageTask("download", retries=2)
tokenize = StageTask("tokenize", retries=1)
benchmark = StageTask("benchmark", retries=2)
pretrained = StageTask("pretrained", retries=2)
train = StageTask("train", retries=1)
evaluate = StageTask("evaluate", retries=1)
harness = StageTask("harness", retries=1)
report = StageTask("report", retries=1)
