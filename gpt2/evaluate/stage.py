"""The evaluate stage: `python -m gpt2.evaluate DIRECTORY`, or the same under torchrun on several GPUs.

Alone, on any model (a checkpoint of ours, a Hugging Face folder, a llm.c file), without a store:

    python -m gpt2.evaluate --folder MODEL --shards FILE... --benchmark hellaswag=FILE easy=arc:FILE [--out scores.json]

Either way each number is the same for any number of processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt2.benchmark.prepared import DESCRIPTION, EXAMPLES
from gpt2.benchmark.stage import KINDS, prepare_files, val_shards
from gpt2.config.run import EvaluateConfig
from gpt2.config.runtime import Runtime
from gpt2.config.section import Section
from gpt2.distributed import World, destroy_process_group, init_process_group, world_from_env
from gpt2.errors import UserError
from gpt2.evaluate.measurement import Measurement, Result, how
from gpt2.model.load import load_any, pick_device
from gpt2.stage import torchrun
from gpt2.stage.directory import StageDir
from gpt2.stage.integrity import check_recorded
from gpt2.stage.manifest import EvaluateFacts, PretrainedFacts, Score, TrainFacts, write_model
from gpt2.stage.metrics import MetricsWriter

SCORES, KEPT = "scores.json", "measured"
PROMPTS = ("llm.c", "harness")


class Scores(Section):
    """scores.json"""

    model: str
    """address of the training, or the path that was given"""
    precision: str
    val_loss: float | None
    val_tokens: int | None
    benchmarks: dict[str, Result]
    skipped: dict[str, str] = {}
    """asked for and not to be had -> why"""

    def lines(self) -> list[str]:
        """For the terminal."""
        found = [f"{self.model} ({self.precision})"]
        if self.val_loss is not None:
            found.append(f"  val loss {self.val_loss:.4f} over {self.val_tokens:,} tokens")
        for name, result in self.benchmarks.items():
            there, lacking = len(result.score.parts), result.left_out
            of_all = f"CORE over {there} of {there + len(lacking)} tasks: " if there else ""
            found.append(f"  {name}: {of_all}{_figures(result.score)}")
            found += [f"    {part}: {_figures(score)}" for part, score in result.score.parts.items()]
            found += [f"    {part}: left out, {why}" for part, why in lacking.items()]
        return found + [f"  {name}: skipped, {why}" for name, why in self.skipped.items()]


def _figures(score: Score) -> str:
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in score.figures().items())
    asked = f" ({score.prompt})" if score.prompt else ""
    cut = f", {score.truncated:,} sequences cut to the context" if score.truncated else ""
    return f"{numbers} of {score.examples:,}{asked}{cut}"


class Progress:
    """Tokens put through the model, on metrics.jsonl about once a second; rank 0 speaks for all."""

    SECONDS = 1.0

    def __init__(self, metrics: MetricsWriter, total: int, world: World) -> None:
        self.metrics, self.total, self.size = metrics, total, world.size
        self.done, self.last = 0, time.monotonic()

    def __call__(self, tokens: int) -> None:
        """Take note of `tokens` more on this process; the others have done about as many."""
        self.done = min(self.total, self.done + tokens * self.size)
        if time.monotonic() - self.last > self.SECONDS:
            self.last = time.monotonic()
            self.metrics.write(0, done=self.done, total=self.total, unit="tokens")


# -------------------------------------------------------------------------------------------------------------- stage


def work(stage: StageDir, world: World) -> None:
    """Measure the stage's model on its validation shards and benchmarks; scores.json and the manifest."""
    config = stage.config(EvaluateConfig)
    shards = val_shards(stage.input("shards"))
    model = load_any(model_folder(stage.input("model")), world.device)
    way = how(stage.runtime, world, model.config.block_size)
    directories = {
        name: stage.input(f"benchmark:{name}").path
        for name in config.benchmarks
        if f"benchmark:{name}" in stage.request.inputs
    }
    check_recorded([*shards, *benchmark_files(directories)])
    metrics = stage.metrics() if world.is_main else None
    progress = None
    if metrics is not None:
        total = config.val_tokens + sum(_tokens(path) for path in directories.values())
        progress = Progress(metrics, total, world)
    measurement = Measurement(model, world, way, stage.path / KEPT / way.precision, progress)
    validation = measurement.validation(shards, config.val_tokens)
    results = {name: measurement.benchmark(name, path) for name, path in directories.items()}
    if metrics is None:
        return
    reasons = stage.request.hints.get("skipped", {})
    skipped = {
        name: reasons.get(name, "its data could not be had") for name in config.benchmarks if name not in directories
    }
    scores = Scores(
        model=stage.request.inputs["model"],
        precision=way.precision,
        val_loss=validation.val_loss,
        val_tokens=validation.val_tokens,
        benchmarks=results,
        skipped=skipped,
    )
    write_model(stage.path / SCORES, scores)
    print("\n".join(scores.lines()), flush=True)
    if validation.val_tokens < config.val_tokens:
        print(
            f"note: the validation shards hold {validation.val_tokens:,} tokens to predict, {config.val_tokens:,} were "
            "asked for: the loss is not comparable with one over more",
            flush=True,
        )
    metrics.write(1, done=1, total=1, unit="evaluations")
    facts = EvaluateFacts(
        val_loss=validation.val_loss,
        val_tokens=validation.val_tokens,
        scores={name: result.score for name, result in results.items()},
        skipped=skipped,
        precision=way.precision,
    )
    stage.finish([SCORES], facts)


def model_folder(stage: StageDir) -> Path:
    """The weights of a finished stage that has some."""
    manifest = stage.manifest
    facts = manifest.facts if manifest is not None else None
    if not isinstance(facts, TrainFacts | PretrainedFacts):
        raise UserError(f"{stage.path} holds no model: run the whole flow again")
    return stage.path / facts.checkpoint


def benchmark_files(directories: Mapping[str, Path]) -> list[Path]:
    """What is read of prepared benchmarks."""
    return [path / name for path in directories.values() for name in (DESCRIPTION, EXAMPLES)]


def _tokens(benchmark: Path) -> int:
    from gpt2.benchmark.prepared import load

    return len(load(benchmark).tokens)


# -------------------------------------------------------------------------------------------------------------- alone


def alone(arguments: argparse.Namespace, world: World) -> None:
    """Measure any model folder and print the figures."""
    init_process_group(world)
    with tempfile.TemporaryDirectory() as scratch:
        directories = prepare_benchmarks(arguments.benchmark, Path(scratch))
        check_recorded([*map(Path, arguments.shards), *benchmark_files(directories)])
        model = load_any(Path(arguments.folder), world.device)
        runtime = Runtime(precision=arguments.precision, micro_batch_size=arguments.micro_batch_size)
        way = how(runtime, world, model.config.block_size)
        measurement = Measurement(model, world, way)
        validation = (
            measurement.validation([Path(file) for file in arguments.shards], arguments.val_tokens)
            if arguments.shards
            else None
        )
        scores = Scores(
            model=arguments.folder,
            precision=way.precision,
            val_loss=None if validation is None else validation.val_loss,
            val_tokens=None if validation is None else validation.val_tokens,
            benchmarks={name: measurement.benchmark(name, path) for name, path in directories.items()},
        )
    if world.is_main:
        print("\n".join(scores.lines()), flush=True)
        if arguments.out:
            write_model(Path(arguments.out), scores)
    world.barrier()
    destroy_process_group()


def prepare_benchmarks(given: Sequence[str], scratch: Path) -> Mapping[str, Path]:
    """Directories of prepared benchmarks by name. Each process prepares for itself: there may be no shared folder.

    Args:
        given: NAME=DIRECTORY for one that a stage prepared; KIND=FILE[,FILE...] for its own files, as in
            hellaswag=hellaswag_val.jsonl, or a folder of them; NAME=KIND:FILE[,FILE...] for several of one kind.
            hellaswag:harness for a kind prompts HellaSwag as lm-evaluation-harness does.

    Raises:
        UserError: none of these, or a name that is given twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} names no benchmark: write hellaswag=FILE, or NAME=DIRECTORY of a prepared one")
        if name in found:
            raise UserError(f"{name} is given twice: give each a name of its own, as in NAME={name}:FILE")
        directory = Path(where)
        if not (directory / DESCRIPTION).exists():
            directory = scratch / str(len(found))
            kind, prompt, files = _asked(name, where)
            prepare_files(kind, prompt, [Path(file) for file in files.split(",")], directory)
        found[name] = directory
    return found


def _asked(name: str, where: str) -> tuple[str, str, str]:
    """Kind, prompt and files of KIND[:PROMPT]=FILES or NAME=KIND[:PROMPT]:FILES."""
    kind, asked, prompt = name.partition(":")
    first, colon, files = where.partition(":")
    if colon and first in KINDS and not asked:
        before, colon, after = files.partition(":")
        return (first, before, after) if colon and before in PROMPTS else (first, "", files)
    if kind not in KINDS:
        raise UserError(
            f"{kind!r} is no kind of benchmark, and none stands before its file: write KIND=FILE or NAME=KIND:FILE, "
            f"with {', '.join(KINDS)} for KIND"
        )
    return kind, prompt, where


def parser() -> argparse.ArgumentParser:
    """Of the command line without a stage's directory."""
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
        f"prepared one; KIND is one of {', '.join(KINDS)}, and hellaswag:harness prompts as lm-evaluation-harness does",
    )
    options.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options.add_argument("--micro-batch-size", default="auto", type=lambda text: text if text == "auto" else int(text))
    options.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options.add_argument("--out", help="also write the figures and every choice to this JSON file")
    return options


def main(arguments: list[str]) -> int:
    """Run the stage on a directory, or evaluate any model without a store; the exit status."""
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        return torchrun.main(work, arguments[0])
    world: World | None = None
    try:
        options = parser().parse_args(arguments)
        world = world_from_env(pick_device(options.device).type)
        alone(options, world)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return torchrun.report_failure(error, world)
    return 0
