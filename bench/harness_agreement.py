"""Do we and lm-evaluation-harness say the same of a model's HellaSwag, example by example, and where not, why?

    python -m bench.harness_agreement MODEL hellaswag_val.jsonl [--limit 100]

One step leads from the harness's figure to llm.c's at a time: how the length of an ending is counted (characters as
the harness does, bytes, tokens), then how the text is put to the model. What changes between two lines of the table is
what that one step does. Where the method is the same, the choices must be too; two endings nearer to each other than
rounding may be chosen either way, and are counted apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2.benchmark.examples import Examples, load
from gpt2.benchmark.stage import prepare_files
from gpt2.console import command
from gpt2.distributed import SINGLE_PROCESS
from gpt2.errors import UserError
from gpt2.evaluate.sequence_losses import SequenceLosses, sequence_losses
from gpt2.harness.lm_eval import Sample, choices, run_harness
from gpt2.model.load import load_any, pick_device

ROUNDING = 1e-4
"""relative: two sums of an ending's fp32 losses that differ by less may come out in either order"""
ENDS = 4
Scored = tuple[Examples, SequenceLosses]


class Line(NamedTuple):
    """One way of choosing, beside the harness's metric that it is or comes nearest to."""

    name: str
    accuracy: float
    metric: str
    theirs: float
    """accuracy by the harness's metric"""
    same: int
    """examples with the same choice"""
    too_close: int
    """of the others, how many are ties but for rounding"""
    examples: int
    why: str
    """they differ; empty where they must not"""


def compare(
    ours: tuple[Examples, SequenceLosses], llmc: tuple[Examples, SequenceLosses], theirs: Sequence[Sample]
) -> list[Line]:
    """The table.

    Args:
        ours: HellaSwag with the harness's prompt, and what the model says of it.
        llmc: the same with llm.c's prompt.
        theirs: what the harness logged for the same model and examples.
    """
    logs = -np.array([sample.log_probs for sample in theirs])  # (E, 4)
    ends = [[end[1:] for end in sample.endings] for sample in theirs]  # without the space before
    chars = np.array([[len(end) for end in row] for row in ends])
    sizes = np.array([[len(end.encode()) for end in row] for row in ends])
    references = {"acc": logs, "acc_norm": logs / chars, "acc_bytes": logs / sizes}
    labels = np.array([sample.label for sample in theirs])
    for metric, costs in references.items():  # our reading of the harness's log must be the harness's own
        right = np.array([sample.right[metric] for sample in theirs])
        if ((costs.argmin(1) == labels) != right).any():
            raise UserError(f"lm-evaluation-harness's {metric} is not what its log says: another version?")

    def line(name: str, metric: str, of: Scored, by: NDArray[np.integer] | None, why: str) -> Line:
        examples, sums = of
        costs = (sums.losses if by is None else sums.losses / by).reshape(-1, ENDS)
        mine, other = costs.argmin(1), references[metric].argmin(1)
        differ = np.flatnonzero(mine != other)
        gaps = np.abs(costs[differ, mine[differ]] - costs[differ, other[differ]]) / costs[differ, mine[differ]]
        return Line(
            name,
            float((mine == examples.labels).mean()),
            metric,
            float((other == labels).mean()),
            len(labels) - len(differ),
            int((gaps < ROUNDING).sum()),
            len(labels),
            why,
        )

    if (ours[0].labels != labels).any() or len(llmc[0].labels) != len(labels):
        raise UserError("the harness and we did not read the same examples")
    prompt = "the prompt: llm.c takes the text as it is, and tokenizes ending and context apart"
    tokens = "the length: an ending's tokens instead of its characters"
    return [
        line("harness prompt, sum (acc)", "acc", ours, None, ""),
        line("harness prompt, by characters (acc_norm_chars)", "acc_norm", ours, ours[0].chars, ""),
        line("harness prompt, by bytes (acc_norm_bytes)", "acc_bytes", ours, ours[0].bytes, ""),
        line("harness prompt, by tokens (acc_norm)", "acc_norm", ours, ours[1].counts, tokens),
        line("llm.c prompt, sum (acc)", "acc", llmc, None, prompt),
        line("llm.c prompt, by characters (acc_norm_chars)", "acc_norm", llmc, llmc[0].chars, prompt),
        line("llm.c prompt, by tokens (acc_norm)", "acc_norm", llmc, llmc[1].counts, f"{tokens}; {prompt}"),
    ]


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    rows = ["| ours | | lm-evaluation-harness | | same choice | why not all |", "|---|---|---|---|---|---|"]
    for line in lines:
        close = f" ({line.too_close} within rounding)" if line.too_close and not line.why else ""
        rows.append(
            f"| {line.name} | {line.accuracy:.4f} | {line.metric} | {line.theirs:.4f} "
            f"| {line.same:,} of {line.examples:,}{close} | {line.why or 'the same method'} |"
        )
    return "\n".join(rows)


def agreement(model: Path, hellaswag: Path, limit: int | None = None, device: str = "auto") -> list[Line]:
    """Run both on one model and one HellaSwag file.

    Raises:
        UserError: the harness is not installed or could not run, there is no model, or the file is not HellaSwag.
    """
    results = run_harness(model, ["hellaswag"], data={"hellaswag": hellaswag}, limit=limit, device=device)
    theirs = choices(results.samples["hellaswag"])
    place = pick_device(device)
    weights = load_any(model, place)
    world = replace(SINGLE_PROCESS, device=place)
    measured = {}
    with TemporaryDirectory() as scratch:
        for prompt in ("harness", "llm.c"):
            prepare_files("hellaswag", prompt, [hellaswag], Path(scratch) / prompt, limit)
            examples = load(Path(scratch) / prompt)
            measured[prompt] = examples, sequence_losses(weights, examples, world, 4096)
    return compare(measured["harness"], measured["llm.c"], theirs)


def main(arguments: list[str]) -> None:
    """The command line; prints the table."""
    options = argparse.ArgumentParser(
        prog="python -m bench.harness_agreement", description=(__doc__ or "").split("\n")[0]
    )
    options.add_argument("model", type=Path, help="checkpoint folder, Hugging Face folder or llm.c file")
    options.add_argument("hellaswag", type=Path, help="hellaswag_val.jsonl, also .gz")
    options.add_argument("--limit", type=int, help="only the first so many examples")
    options.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    given = options.parse_args(arguments)
    print(table(agreement(given.model, given.hellaswag, given.limit, given.device)))


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
