"""EleutherAI's lm-evaluation-harness itself, on any model that this project can read.

    python -m gpt2.harness MODEL TASK... [--data hellaswag=hellaswag_val.jsonl] [--limit 100] [--out results.json]

It is an optional part (`pip install 'reproduce-gpt2[harness]'`). The model is exported to a Hugging Face folder first
and then handed over, so what is measured is what others would download. Tasks take their data from the Hub, unless a
local file is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gpt2.atomic import write_text
from gpt2.errors import UserError
from gpt2.export.hf import export_hf
from gpt2.model.load import pick_device

METRICS = ("acc", "acc_norm", "acc_bytes")


class Sample(NamedTuple):
    """One example of a multiple-choice task as the harness saw it."""

    label: int
    log_probs: tuple[float, ...]
    """of each ending, summed over its tokens"""
    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    """with the space before it"""
    right: dict[str, bool]
    """by the harness's own metrics: acc, acc_norm, acc_bytes"""


class HarnessResults(NamedTuple):
    version: str
    """of lm-evaluation-harness"""
    figures: dict[str, dict[str, float]]
    """task -> metric -> value"""
    samples: dict[str, list[dict[str, Any]]]
    """task -> what the harness logged of each example"""
    skipped: dict[str, str]
    """tasks whose data could not be had -> why"""


def run_harness(
    model: Path,
    tasks: Sequence[str],
    *,
    data: Mapping[str, Path] | None = None,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int = 16,
) -> HarnessResults:
    """Evaluate a model in fp32; each task by itself, so that one whose data is missing costs only itself.

    Args:
        model: whatever `gpt2.model.load.resolve` knows.
        tasks: the harness's names, such as hellaswag, or paths of task files.
        data: task -> file (jsonl or parquet) to take its examples from, instead of the Hub.
        limit: only the first so many examples of each.
        device: as `gpt2.model.load.pick_device` takes it.

    Raises:
        UserError: the harness is not installed, there is no model or no such device, or no task could be run.
    """
    chosen = str(pick_device(device))
    harness = _harness()
    with tempfile.TemporaryDirectory() as scratch:
        exported = export_hf(model, Path(scratch) / "model")
        wrapped = harness.HFLM(pretrained=str(exported), device=chosen, batch_size=batch_size, dtype="float32")
        figures: dict[str, dict[str, float]] = {}
        samples: dict[str, list[dict[str, Any]]] = {}
        skipped: dict[str, str] = {}
        for task in tasks:
            where = (data or {}).get(
                task,
                "the Hugging Face Hub (its client retries where it does not answer; HF_HUB_OFFLINE=1 does not ask)",
            )
            print(f"harness: {task}, examples from {where}", file=sys.stderr, flush=True)
            try:
                spec = _with_data(harness, task, (data or {})[task], Path(scratch)) if task in (data or {}) else task
                found = harness.simple_evaluate(
                    wrapped, tasks=[spec], limit=limit, bootstrap_iters=0, task_manager=harness.manager
                )
            except Exception as error:
                # whatever the harness or the Hub's client raises: they document no exception for "no such data"
                skipped[task] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                continue
            for name, values in found["results"].items():
                numbers = {key.split(",")[0]: value for key, value in values.items() if key.endswith(",none")}
                figures[name] = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
            samples |= found["samples"]
    if not figures:
        raise UserError("; ".join(f"{task} could not be run: {why}" for task, why in skipped.items()))
    return HarnessResults(harness.version, figures, samples, skipped)


def choices(logged: list[dict[str, Any]]) -> list[Sample]:
    """The examples of a multiple-choice task, in the order of the data."""
    return [
        Sample(
            label=int(one["target"]),
            log_probs=tuple(float(answer[0]) for answer in one["filtered_resps"]),
            contexts=tuple(argument[0] for argument in one["arguments"]),
            endings=tuple(argument[1] for argument in one["arguments"]),
            right={metric: bool(one[metric]) for metric in METRICS if metric in one},
        )
        for one in sorted(logged, key=lambda one: int(one["doc_id"]))
    ]


class _Harness(NamedTuple):
    version: str
    HFLM: Any
    simple_evaluate: Any
    manager: Any


@cache
def _harness() -> _Harness:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not there ({error}): pip install 'reproduce-gpt2[harness]'"
        ) from error
    return _Harness(lm_eval.__version__, HFLM, lm_eval.simple_evaluate, TaskManager())


def _with_data(harness: _Harness, task: str, file: Path, scratch: Path) -> str:
    """Path of a task file that is the harness's own task on the examples of `file`, and with all three accuracies."""
    own = harness.manager.task_index[task]
    split = _split(own.yaml_path)
    kind = "parquet" if file.suffix == ".parquet" else "json"
    config: dict[str, Any] = {
        "include": str(own.yaml_path),
        "task": task,
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file.absolute())}, "cache_dir": str(scratch / "datasets")},
        **{f"{other}_split": None for other in ("training", "validation", "test", "fewshot")},
        "validation_split" if split == "validation" else "test_split": split,
    }
    if _form(own.yaml_path) == "multiple_choice":
        config["metric_list"] = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS]
    path = scratch / f"{task}.yaml"
    write_text(path, json.dumps(config))  # JSON is YAML
    return str(path)


def _task_config(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(path, resolve_func=False))


def _split(path: Path) -> str:
    """The split that the harness evaluates: test where there is one."""
    config = _task_config(path)
    return str(config.get("test_split") or config.get("validation_split") or "test")


def _form(path: Path) -> str:
    return str(_task_config(path).get("output_type"))


def main(arguments: list[str]) -> None:
    """The command line; prints a table."""
    options = argparse.ArgumentParser(prog="python -m gpt2.harness", description=(__doc__ or "").split("\n")[0])
    options.add_argument("model", type=Path, help="checkpoint folder, Hugging Face folder or llm.c file")
    options.add_argument("tasks", nargs="+", help="names of tasks, or paths of task files")
    options.add_argument("--data", nargs="+", default=[], metavar="TASK=FILE", help="examples from a local file")
    options.add_argument("--limit", type=int, help="only the first so many examples of each task")
    options.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--out", type=Path, help="also write figures and samples to this JSON file")
    given = options.parse_args(arguments)
    data = dict(text.partition("=")[::2] for text in given.data)
    results = run_harness(
        given.model,
        given.tasks,
        data={task: Path(file) for task, file in data.items()},
        limit=given.limit,
        device=given.device,
        batch_size=given.batch_size,
    )
    for task, figures in results.figures.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    for task, why in results.skipped.items():
        print(f"{task}: skipped, {why}")
    if given.out:
        write_text(given.out, json.dumps(results._asdict(), default=str) + "\n")
