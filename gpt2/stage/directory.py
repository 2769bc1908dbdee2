"""The frame around every stage: directories, lock, provenance, the manifest last.

A stage is a function from directories to a directory. Its process is started on a directory that holds request.json
and runtime.json, and ends with manifest.json written or with a non-zero exit status.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from gpt2.config.runtime import Runtime
from gpt2.config.section import Section
from gpt2.console import fail
from gpt2.errors import UserError, without_credentials
from gpt2.stage.facts import Facts
from gpt2.stage.failure import Failure, clear_failure, error_message, write_failure
from gpt2.stage.manifest import (
    INPUTS,
    MANIFEST,
    METRICS,
    PROVENANCE,
    REQUEST,
    RUNTIME,
    Manifest,
    Request,
    file_entry,
    read_model,
    write_model,
)
from gpt2.stage.metrics import MetricsWriter
from gpt2.stage.table import STAGES
from gpt2.version import code_version, git_commit

C = TypeVar("C", bound=Section)
PACKAGES = ("torch", "tiktoken", "numpy", "pyarrow", "safetensors", "prefect", "mlflow", "pydantic")
LOCK = ".lock"
SUPERSEDED = "superseded"
"""folder of a stage's directory, for earlier work that was made from other contents of its inputs"""


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


class MadeFrom(Section):
    """inputs.json: which contents of its inputs the work in a stage's directory is made from."""

    digests: dict[str, str]
    """role -> digest of the input's manifest"""


class StageDir:
    """A stage's directory: what it was asked, its inputs' directories, and where it writes."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if not (self.path / REQUEST).exists():
            raise UserError(
                f"{self.path} holds no {REQUEST}: run the flow, or write one with `python -m gpt2.plan RECIPE --write`"
            )
        self.started = time.time()
        self._digests: dict[str, str] | None = None

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
            UserError: it is not finished, or its own inputs changed since.
        """
        directory = StageDir(self._input_path(role))
        if directory.manifest is None:
            raise UserError(f"{directory.path} is not finished (no {MANIFEST}): run the whole flow again")
        if why := directory.outdated():
            raise UserError(f"{directory.path} is out of date ({why}): run the whole flow again")
        return directory

    def _input_path(self, role: str) -> Path:
        return self.path.parent.parent / self.request.inputs[role]

    def _input_digests(self) -> dict[str, str]:
        """Role -> digest of what the input holds now, for the inputs that are finished."""
        manifests = {role: self._input_path(role) / MANIFEST for role in self.request.inputs}
        return {role: read_model(path, Manifest).digest for role, path in manifests.items() if path.exists()}

    def outdated(self) -> str | None:
        """Why the finished stage has to run again: an input was made again and holds something else. None: it need not,
        or is not finished. An input that was deleted says nothing.

        A manifest of a version that recorded no digests counts as made from the present inputs, unless a stage whose
        bytes are not decided by its address (a training, an evaluation) ended after this one.
        """
        manifest = self.manifest
        if manifest is None:
            return None
        for role, now in self._input_digests().items():
            address = self.request.inputs[role]
            if manifest.inputs is None:
                stage = STAGES.get(address.partition("/")[0])
                varies = stage is not None and not stage.reproducible
                if varies and self._ended_before(self._input_path(role)):
                    return f"its input {role}, {address}, was made again after it"
            elif manifest.inputs.get(role) != now:
                then = manifest.inputs.get(role, "unknown")
                return f"its input {role}, {address}, had the digest {then[:12]}, now {now[:12]}"
        return None

    def _ended_before(self, other: Path) -> bool:
        paths = self.path / PROVENANCE, other / PROVENANCE
        if not all(path.exists() for path in paths):
            return False
        ours, theirs = (read_model(path, Provenance).ended for path in paths)
        return ours < theirs

    def begin(self) -> bool:
        """Whether there is work to do; called under the lock, before any work. What was made from other contents of the
        inputs, finished or not, is moved into `SUPERSEDED`: resuming it would mix the two.

        Raises:
            UserError: an input is not finished.
        """
        why = self.outdated()
        if self.manifest is not None and why is None:
            return False
        self._digests = {role: read_model(self.input(role).path / MANIFEST, Manifest).digest
                         for role in self.request.inputs}  # fmt: skip
        record = self.path / INPUTS
        before = read_model(record, MadeFrom).digests if record.exists() else None
        if why or before not in (None, self._digests):
            self._set_aside(why or f"inputs had the digests {before}, now {self._digests}")
        write_model(record, MadeFrom(digests=self._digests))
        return True

    def _set_aside(self, why: str) -> None:
        """Move all work away. Killed on the way, the next `begin` moves the rest."""
        if not (self.path / INPUTS).exists():
            write_model(self.path / INPUTS, MadeFrom(digests={"before": "unknown"}))
        earlier = self.path / SUPERSEDED
        target = earlier / f"{len(list(earlier.glob('*'))) + 1:03d}"
        target.mkdir(parents=True)
        stay = {REQUEST, RUNTIME, INPUTS, LOCK, SUPERSEDED}
        names = sorted(path.name for path in self.path.iterdir() if path.name not in stay)
        for name in sorted(names, key=lambda name: name != MANIFEST):  # first: what says that this is finished
            (self.path / name).rename(target / name)
        print(f"{why}: earlier work is kept in {target}; delete it if it is not needed", flush=True)

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
        with open(self.path / LOCK, "w") as file:
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
            inputs=self._input_digests() if self._digests is None else self._digests,
            version=code_version(),
            files=tuple(file_entry(self.path, name, known.get(name)) for name in files),
            facts=facts,
        )
        write_model(self.path / MANIFEST, manifest)
        return manifest


def is_finished(path: Path) -> bool:
    """Whether the stage in `path` is finished, and from what its inputs hold now."""
    if not (path / MANIFEST).exists():
        return False
    return not (path / REQUEST).exists() or StageDir(path).outdated() is None


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


def main(work: Callable[[StageDir], object], argv: list[str] | None = None) -> None:
    """Entry point of a single-process stage: `python -m gpt2.<stage> DIRECTORY`.

    Takes the lock and does nothing when the stage is finished already. Exits with status 2 and one line for a UserError
    or an OSError, with 1 and a traceback for any other exception, and writes failure.json in both cases.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        sys.exit(f"usage: python -m {sys.orig_argv[2] if len(sys.orig_argv) > 2 else 'gpt2.<stage>'} DIRECTORY")
    path = Path(arguments[0])
    try:
        directory = StageDir(path)
        with directory.lock():
            clear_failure(path)
            if directory.begin():
                work(directory)
    except (UserError, OSError) as error:
        message = error_message(error)
        write_failure(path, Failure(kind="user", message=message))
        fail(message, 2)
    except KeyboardInterrupt:
        write_failure(path, Failure(kind="interrupted", message="interrupted by SIGINT; run it again to go on"))
        raise
    except Exception as error:
        write_failure(path, Failure(kind="crash", message=error_message(error)))
        traceback.print_exc()
        sys.exit(1)
