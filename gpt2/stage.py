"""The frame around every stage: directories, lock, provenance, the manifest last.

A stage is a function from directories to a directory. Its process is started on a directory that holds request.json
and runtime.json, and ends with manifest.json written or with a non-zero exit status.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from gpt2.config import Runtime, Section
from gpt2.console import fail
from gpt2.errors import UserError, describe, without_credentials
from gpt2.manifest import (
    MANIFEST,
    METRICS,
    PROVENANCE,
    REQUEST,
    RUNTIME,
    Facts,
    Manifest,
    Request,
    file_entry,
    read_model,
    write_model,
)
from gpt2.metrics import MetricsWriter

C = TypeVar("C", bound=Section)
PACKAGES = ("torch", "tiktoken", "numpy", "pyarrow", "safetensors", "prefect", "mlflow", "pydantic")
COMMIT = "GPT2_COMMIT"
"""environment variable, set where the code runs without its history"""


class Provenance(Section):
    """Where and when a stage ran; never hashed."""

    commit: str | None
    host: str
    python: str
    platform: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    started: float
    """Unix seconds, of the session that finished the stage"""
    ended: float
    command: tuple[str, ...]


class StageDir:
    """A stage's directory: what it was asked, its inputs' directories, and where it writes."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if not (self.path / REQUEST).exists():
            raise UserError(
                f"{self.path} holds no {REQUEST}: run the flow, or write one with `python -m gpt2.plan RECIPE --write`"
            )
        self.started = time.time()

    @cached_property
    def request(self) -> Request:
        return read_model(self.path / REQUEST, Request)

    @cached_property
    def runtime(self) -> Runtime:
        """How to run on this machine; the defaults where the directory holds no runtime.json."""
        path = self.path / RUNTIME
        return read_model(path, Runtime) if path.exists() else Runtime(store=self.path.parent.parent)

    def config(self, model: type[C]) -> C:
        """This stage's section of the configuration."""
        return model.model_validate(self.request.config)

    def input(self, role: str) -> StageDir:
        """The directory of a finished input stage.

        Raises:
            UserError: it is not finished.
        """
        directory = StageDir(self.path.parent.parent / self.request.inputs[role])
        if directory.manifest is None:
            raise UserError(f"{directory.path} is not finished (no {MANIFEST}): run the whole flow again")
        return directory

    @property
    def manifest(self) -> Manifest | None:
        """None as long as the stage is not finished."""
        path = self.path / MANIFEST
        return read_model(path, Manifest) if path.exists() else None

    def facts(self, model: type[C]) -> C:
        """The facts of a finished stage."""
        manifest = self.manifest
        if manifest is None or not isinstance(manifest.facts, model):
            raise UserError(f"{self.path} has no {model.__name__}: run the whole flow again")
        return manifest.facts

    def metrics(self) -> MetricsWriter:
        return MetricsWriter(self.path / METRICS)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory: one process works, a second waits. The kernel lets go when the holder dies, however."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is working on {self.path}; waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finish(self, files: Iterable[str], facts: Facts, *, sha256: Mapping[str, str] | None = None) -> Manifest:
        """Write provenance.json, then manifest.json over `files` (relative paths): the stage is finished.

        Args:
            sha256: of files that this process verified already, by path; the others are read and hashed here.
        """
        known = sha256 or {}
        write_model(self.path / PROVENANCE, provenance(self.started))
        manifest = Manifest(
            address=self.request.address,
            files=tuple(file_entry(self.path, name, known.get(name)) for name in files),
            facts=facts,
        )
        write_model(self.path / MANIFEST, manifest)
        return manifest


def provenance(started: float) -> Provenance:
    """Describe this process and machine."""
    from gpt2.machine import gpu_names

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Provenance(
        commit=git_commit(),
        host=socket.gethostname(),
        python=platform.python_version(),
        platform=platform.platform(),
        versions=versions,
        gpus=tuple(gpu_names()),
        started=started,
        ended=time.time(),
        command=tuple(without_credentials(word) for word in sys.orig_argv),
    )


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+" when files differ from it. Outside a checkout, as in an
    image, what `COMMIT` says; None where nothing does."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT) or None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def main(work: Callable[[StageDir], object], argv: list[str] | None = None) -> None:
    """Entry point of a single-process stage: `python -m gpt2.<stage> DIRECTORY`.

    Takes the lock, does nothing when the stage is finished already, exits with status 2 and one line for a UserError
    and with 1 and a traceback for anything else.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        sys.exit(f"usage: python -m {sys.orig_argv[2] if len(sys.orig_argv) > 2 else 'gpt2.<stage>'} DIRECTORY")
    try:
        directory = StageDir(Path(arguments[0]))
        with directory.lock():
            if directory.manifest is None:
                work(directory)
    except UserError as error:
        fail(str(error), 2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail(f"no space left for {arguments[0]}: free some and run again, finished work is kept", 2)
        fail(describe(error), 2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
