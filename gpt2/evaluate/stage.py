"""The evaluate stage: `python -m gpt2.evaluate DIRECTORY`, also under torchrun on several GPUs.

Without a store, on any model (checkpoint, Hugging Face folder, llm.c file):

    python -m gpt2.evaluate --folder MODEL --shards FILE... --benchmark hellaswag=FILE easy=arc:FILE [--out scores.json]

The results do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt2.benchmark.examples import DESCRIPTION, EXAMPLES, load
from gpt2.benchmark.stage import KINDS, prepare_files, val_shards
from gpt2.config.run import EvaluateConfig
from gpt2.config.runtime import Runtime
from gpt2.config.section import Section
from gpt2.distributed import World, destroy_process_group, init_process_group, world_from_env
from gpt2.errors import UserError
from gpt2.evaluate.evaluator import BenchmarkResult, Evaluator, eval_settings
from gpt2.model.load import load_any, pick_device
from gpt2.stage import torchrun
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import EvaluateFacts, PretrainedFacts, Score, TrainFacts
from gpt2.stage.integrity import check_recorded
from gpt2.stage.manifest import write_model
from gpt2.stage.metrics import MetricsWriter

SCORES, CACHE = "scores.json", "measured"
PROMPTS = ("llm.c", "harness")


class Scores(Section):
    """scores.json"""

    model: str
    """address of the training, or the path of --folder"""
    precision: str
    val_loss: float | None
    val_tokens: int | None
    benchmarks: dict[str, BenchmarkResult]
    skipped: dict[str, str] = {}
    """configured benchmark without data -> reason"""

    def lines(self) -> list[str]:
        """Text for the terminal."""
        lines = [f"{self.model} ({self.precision})"]
        if self.val_loss is not None:
            lines.append(f"  val loss {self.val_loss:.4f} over {self.val_tokens:,} tokens")
        for name, result in self.benchmarks.items():
            n_parts, left_out = len(result.score.parts), result.left_out
            of_all = f"CORE over {n_parts} of {n_parts + len(left_out)} tasks: " if n_parts else ""
            lines.append(f"  {name}: {of_all}{_figures(result.score)}")
            lines += [f"    {part}: {_figures(score)}" for part, score in result.score.parts.items()]
            lines += [f"    {part}: left out, {reason}" for part, reason in left_out.items()]
        return lines + [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]


def _figures(score: Score) -> str:
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in score.figures().items())
    prompt = f" ({score.prompt})" if score.prompt else ""
    truncated = f", {score.truncated:,} sequences truncated to the context" if score.truncated else ""
    return f"{numbers} of {score.examples:,}{prompt}{truncated}"


class EvaluateProgress:
    """Writes the number of evaluated tokens to metrics.jsonl once per second; rank 0 estimates it for all ranks."""

    SECONDS = 1.0

    def __init__(self, metrics: MetricsWriter, total: int, world: World) -> None:
        self.metrics, self.total, self.size = metrics, total, world.size
        self.done, self.last = 0, time.monotonic()

    def __call__(self, tokens: int) -> None:
        """Count `tokens` more on this process, and as many on each of the others."""
        self.done = min(self.total, self.done + tokens * self.size)
        if time.monotonic() - self.last > self.SECONDS:
            self.last = time.monotonic()
            self.metrics.write(0, done=self.done, total=self.total, unit="tokens")


# -------------------------------------------------------------------------------------------------------------- stage


def work(stage: StageDir, world: World) -> None:
    """Evaluate the model on the validation shards and benchmarks; write scores.json and the manifest."""
    config = stage.config(EvaluateConfig)
    shards = val_shards(stage.input("shards"))
    model = load_any(model_folder(stage.input("model")), world.device)
    settings = eval_settings(stage.runtime, world, model.config.block_size)
    directories = {
        name: stage.input(f"benchmark:{name}").path
        for name in config.benchmarks
        if f"benchmark:{name}" in stage.request.inputs
    }
    check_recorded([*shards, *benchmark_files(directories)])
    metrics = stage.metrics() if world.is_main else None
    progress = None
    if metrics is not None:
        total = config.val_tokens + sum(len(load(path).tokens) for path in directories.values())
        progress = EvaluateProgress(metrics, total, world)
    evaluator = Evaluator(model, world, settings, stage.path / CACHE / settings.precision, progress)
    validation = evaluator.validation(shards, config.val_tokens)
    results = {name: evaluator.benchmark(name, path) for name, path in directories.items()}
    if metrics is None:
        return
    reasons = stage.request.hints.get("skipped", {})
    skipped = {
        name: reasons.get(name, "its data is not available") for name in config.benchmarks if name not in directories
    }
    scores = Scores(
        model=stage.request.inputs["model"],
        precision=settings.precision,
        val_loss=validation.val_loss,
        val_tokens=validation.val_tokens,
        benchmarks=results,
        skipped=skipped,
    )
    write_model(stage.path / SCORES, scores)
    print("\n".join(scores.lines()), flush=True)
    if validation.val_tokens < config.val_tokens:
        print(
            f"note: the validation shards hold {validation.val_tokens:,} tokens to predict, evaluate.val_tokens is "
            f"{config.val_tokens:,}: the loss is not comparable with one over more tokens",
            flush=True,
        )
    metrics.write(1, done=1, total=1, unit="evaluations")
    facts = EvaluateFacts(
        val_loss=validation.val_loss,
        val_tokens=validation.val_tokens,
        scores={name: result.score for name, result in results.items()},
        skipped=skipped,
        precision=settings.precision,
    )
    stage.finish([SCORES], facts)


def model_folder(stage: StageDir) -> Path:
    """Folder of the weights of a finished train or pretrained stage."""
    manifest = stage.manifest
    facts = manifest.facts if manifest is not None else None
    if not isinstance(facts, TrainFacts | PretrainedFacts):
        raise UserError(f"{stage.path} holds no model: run the whole flow again")
    return stage.path / facts.checkpoint


def benchmark_files(directories: Mapping[str, Path]) -> list[Path]:
    """The files of prepared benchmarks."""
    return [path / name for path in directories.values() for name in (DESCRIPTION, EXAMPLES)]


# ---------------------------------------------------------------------------------------------------- without a store


def evaluate_folder(arguments: argparse.Namespace, world: World) -> None:
    """Evaluate any model and print the scores."""
    init_process_group(world)
    with tempfile.TemporaryDirectory() as scratch:
        directories = prepare_benchmarks(arguments.benchmark, Path(scratch))
        check_recorded([*map(Path, arguments.shards), *benchmark_files(directories)])
        model = load_any(Path(arguments.folder), world.device)
        runtime = Runtime(precision=arguments.precision, micro_batch_size=arguments.micro_batch_size)
        settings = eval_settings(runtime, world, model.config.block_size)
        evaluator = Evaluator(model, world, settings)
        validation = (
            evaluator.validation([Path(file) for file in arguments.shards], arguments.val_tokens)
            if arguments.shards
            else None
        )
        scores = Scores(
            model=arguments.folder,
            precision=settings.precision,
            val_loss=None if validation is None else validation.val_loss,
            val_tokens=None if validation is None else validation.val_tokens,
            benchmarks={name: evaluator.benchmark(name, path) for name, path in directories.items()},
        )
    if world.is_main:
        print("\n".join(scores.lines()), flush=True)
        if arguments.out:
            write_model(Path(arguments.out), scores)
    world.barrier()
    destroy_process_group()


def prepare_benchmarks(options: Sequence[str], scratch: Path) -> Mapping[str, Path]:
    """Directories of prepared benchmarks by name. Each process prepares its own: no folder may be shared.

    Args:
        options: NAME=DIRECTORY of a benchmark stage; KIND=FILE[,FILE...] for the benchmark's own files, as in
            hellaswag=hellaswag_val.jsonl, or a folder of them; NAME=KIND:FILE[,FILE...] for several of one kind.
            The kind hellaswag:harness uses the prompt of lm-evaluation-harness.

    Raises:
        UserError: another form, or a repeated name.
    """
    directories: dict[str, Path] = {}
    for text in options:
        name, equals, where = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} names no benchmark: write hellaswag=FILE, or NAME=DIRECTORY of a prepared one")
        if name in directories:
            raise UserError(f"{name} is used twice: use different names, as in NAME={name}:FILE")
        directory = Path(where)
        if not (directory / DESCRIPTION).exists():
            directory = scratch / str(len(directories))
            kind, prompt, files = _parse_benchmark(name, where)
            prepare_files(kind, prompt, [Path(file) for file in files.split(",")], directory)
        directories[name] = directory
    return directories


def _parse_benchmark(name: str, where: str) -> tuple[str, str, str]:
    """Kind, prompt and files of KIND[:PROMPT]=FILES or NAME=KIND[:PROMPT]:FILES."""
    kind, separator, prompt = name.partition(":")
    first, colon, files = where.partition(":")
    if colon and first in KINDS and not separator:
        before, colon, after = files.partition(":")
        return (first, before, after) if colon and before in PROMPTS else (first, "", files)
    if kind not in KINDS:
        raise UserError(
            f"{kind!r} is not a kind of benchmark: use KIND=FILE or NAME=KIND:FILE, with KIND one of {', '.join(KINDS)}"
        )
    return kind, prompt, where


def parser() -> argparse.ArgumentParser:
    """Parser of the command line without a store."""
    options = argparse.ArgumentParser(prog="python -m gpt2.evaluate", description=__doc__.split("\n")[0])
    options.add_argument("--folder", required=True, help="checkpoint folder, Hugging Face folder or llm.c file")
    options.add_argument("--shards", nargs="+", default=[], help="validation shards, for the validation loss")
    options.add_argument("--val-tokens", type=int, default=EvaluateConfig().val_tokens)
    options.add_argument(
        "--benchmark",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="KIND=FILE[,FILE...] or KIND=FOLDER, NAME=KIND:FILE for several of one kind, or NAME=DIRECTORY of a "
        f"prepared one; KIND is one of {', '.join(KINDS)}, and hellaswag:harness uses the harness's prompt",
    )
    options.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options.add_argument("--micro-batch-size", default="auto", type=lambda text: text if text == "auto" else int(text))
    options.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options.add_argument("--out", help="also write the scores and predictions to this JSON file")
    return options


def main(arguments: list[str]) -> int:
    """Run the stage, or evaluate a model without a store; returns the exit status."""
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        return torchrun.main(work, arguments[0])
    world: World | None = None
    try:
        options = parser().parse_args(arguments)
        world = world_from_env(pick_device(options.device).type)
        evaluate_folder(options, world)
    except SystemExit:
        raise
    except BaseException as error:
        return torchrun.report_failure(error, world)
    return 0
