"""Readers of benchmarks: from their own files to sequences of which the end is scored. One module a benchmark.

read(config, files, encode) -> ReaderOutput
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.benchmark import arc, core, hellaswag, lambada, piqa, wikitext103, winogrande
from gpt2.benchmark.prompts import Encode, ReaderOutput
from gpt2.config.benchmarks import Arc, Benchmark, Core, HellaSwag, Lambada, Piqa, WikiText103, WinoGrande

Reader = Callable[[Any, list[Path], Encode], ReaderOutput]

READERS: dict[type[Benchmark], Reader] = {
    HellaSwag: hellaswag.read,
    Lambada: lambada.read,
    Arc: arc.read,
    Piqa: piqa.read,
    WinoGrande: winogrande.read,
    WikiText103: wikitext103.read,
    Core: core.read,
}
