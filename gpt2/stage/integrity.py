"""Files of finished stages, compared with what their manifests record before they are used: a byte that a disk changed
leaves size and time as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from gpt2.errors import UserError
from gpt2.stage.file_hashes import Stamp
from gpt2.stage.manifest import MANIFEST, REQUEST, FileEntry, Manifest, canonical, read_model

DEPTH = 3
"""of files below a stage's directory: checkpoints/step_00000020/model.safetensors"""


def check_recorded(paths: Iterable[Path]) -> None:
    """Read every file that belongs to a finished stage and compare its sha256; files outside of stages pass.

    Raises:
        UserError: a file is not what the manifest records.
    """
    recorded: dict[Path, tuple[Manifest, dict[str, FileEntry]]] = {}
    for path in (path.absolute() for path in paths):
        directory = _stage_of(path)
        if directory is None:
            continue
        if directory not in recorded:
            manifest = read_model(directory / MANIFEST, Manifest)
            recorded[directory] = manifest, {}
        manifest, wanted = recorded[directory]
        name = path.relative_to(directory).as_posix()
        wanted |= {entry.path: entry for entry in manifest.files if entry.path == name}
    for directory, (manifest, wanted) in recorded.items():
        used = manifest.model_copy(update={"files": tuple(wanted.values())})
        if problems := used.problems(directory, deep=True):
            raise UserError(f"{problems[0]}; run the recipe with runtime.verify=true, which makes it again")


class Unchanged:
    """The files of a finished stage, which must stay as they are while another stage reads them.

    Raises:
        UserError: a file is not what the manifest records.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._paths = [directory / entry.path for entry in manifest.files]
        self._stamps = self._look()  # before they are compared: a later change shows
        if problems := manifest.problems(directory):
            raise UserError(f"{problems[0]}; put the file back, or run again, and the change is planned")

    def _look(self) -> list[Stamp | None]:
        return [Stamp.of(path) if path.exists() else None for path in self._paths]

    @property
    def digest(self) -> str:
        """Of the stamps: unfinished work goes on only from the files that it began with."""
        return hashlib.sha256(canonical(self._stamps).encode()).hexdigest()

    def check(self) -> None:
        """
        Raises:
            UserError: a file was touched. Its hash may be the recorded one again, but was not when it was read.
        """
        for path, before, now in zip(self._paths, self._stamps, self._look(), strict=True):
            if now != before:
                raise UserError(f"{path.resolve()} was changed while the stage read it: run again, it begins again")


def _stage_of(path: Path) -> Path | None:
    for directory in path.parents[:DEPTH]:
        if (directory / MANIFEST).exists() and (directory / REQUEST).exists():
            return directory
    return None
