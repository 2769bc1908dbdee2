"""The definition of every number that the project prints, in one place.

python -m gpt2.report.definitions > docs/metrics.md

writes the table for people; a test compares it with the names that the code uses.
"""

from __future__ import annotations

from typing import NamedTuple

from gpt2.console import command


class Definition(NamedTuple):
    name: str
    unit: str
    meaning: str


GROUPS: dict[str, tuple[Definition, ...]] = {
    "During training: lines of metrics.jsonl, curves in MLflow and in the report": (
        Definition(
            "train/loss",
            "nats a token",
            "Mean cross-entropy of the step's own batch, over all its tokens and all processes, before the step "
            "changes the weights; softmax over the 50,257 real tokens.",
        ),
        Definition(
            "train/lr",
            "",
            "Learning rate that the step used.",
        ),
        Definition(
            "train/grad_norm",
            "",
            "Euclidean norm of the whole gradient of the step, over all parameters, before clipping.",
        ),
        Definition(
            "train/tokens",
            "tokens",
            "Tokens trained on so far: steps × total_batch_size.",
        ),
        Definition(
            "train/tokens_per_second",
            "tokens/s",
            "total_batch_size / mean duration of the steps since the last logged line (train/step_ms), all GPUs "
            "together.",
        ),
        Definition(
            "train/step_ms",
            "ms",
            "Wall time of an optimizer step, mean over the steps since the last logged line or, after a "
            "resume, since the resume (runtime.log_every): all micro-steps, the all-reduce, clipping and the update; "
            "validation, benchmarks, samples and checkpoints not counted.",
        ),
        Definition(
            "train/mfu",
            "share",
            "Model FLOPs utilisation over the steps since the last logged line: train/tokens_per_second × "
            "flops_per_token / (GPUs × peak bf16 FLOP/s of one, from the maker's data sheet, without sparsity). Not "
            "written where the peak is not known.",
        ),
        Definition(
            "val/loss",
            "nats a token",
            "Mean cross-entropy over the first train.val.tokens tokens of the validation shard, whatever the "
            "batch or the number of GPUs; softmax over the 50,257 real tokens. The line of step 0 is of the "
            "initial weights.",
        ),
        Definition(
            "benchmark/<name>/<figure>",
            "",
            "A benchmark scored on the weights after that step; figures as below.",
        ),
        Definition(
            "harness/<task>/<metric>",
            "",
            "What lm-evaluation-harness itself gives for the final weights, exported to Hugging Face's format, in "
            "fp32; tasks and metrics by its own names. Only where the recipe asks for it.",
        ),
    ),
    "Facts of training": (
        Definition(
            "steps",
            "",
            "Optimizer steps.",
        ),
        Definition(
            "tokens",
            "tokens",
            "Tokens trained on: steps × total_batch_size; a token seen twice counts twice.",
        ),
        Definition(
            "n_params",
            "",
            "Trainable parameters with the real vocabulary of 50,257, embeddings included; the head is tied and "
            "counts once.",
        ),
        Definition(
            "train_loss",
            "nats a token",
            "Mean of train/loss over the last 1 % of steps, at least one.",
        ),
        Definition(
            "train_seconds",
            "s",
            "Time inside optimizer steps, over all sessions; validation, benchmarks, samples and checkpoints "
            "not counted.",
        ),
        Definition(
            "total_seconds",
            "s",
            "Wall time of all sessions of training, everything counted, from the creation of the model to the "
            "manifest. Not counted: the start of the processes, and what a session that was killed (SIGKILL, power "
            "cut) did after its last checkpoint; those steps are taken again and count then.",
        ),
        Definition(
            "gpu_seconds",
            "s",
            "Wall time × GPUs, summed over sessions; same limits as total_seconds. 0 on CPUs. A checkpoint or manifest "
            "that does not record its sessions counts as one session on the devices recorded with it or next.",
        ),
        Definition(
            "tokens_per_second",
            "tokens/s",
            "Median over logged lines of train/tokens_per_second, of all sessions.",
        ),
        Definition(
            "flops_per_token",
            "FLOPs",
            "6 N + 6 L C T: N parameters (n_params), L layers, C width, T context; forward and backward pass, "
            "attention causal. llm.c's formula, with the real vocabulary where llm.c counts 50,304 rows (124M: 0.027 % "
            "less). nanoGPT counts 12 L C T.",
        ),
        Definition(
            "mfu",
            "share",
            "Median over logged lines of train/mfu: tokens/s × flops_per_token / (GPUs × peak bf16 FLOP/s of one), "
            "each line with the GPUs of its session.",
        ),
        Definition(
            "world_size",
            "",
            "Processes of the last session, one per GPU. Devices of all sessions: device.",
        ),
    ),
    "Evaluation": (
        Definition(
            "val_loss",
            "nats a token",
            "Of the finished weights: mean cross-entropy over the first evaluate.val_tokens tokens of the "
            "validation shard (10,485,760 unless said otherwise), softmax over the 50,257 real tokens. exp of "
            "it is the perplexity a token.",
        ),
        Definition(
            "val_tokens",
            "tokens",
            "In evaluation: tokens that val_loss is over. In tokenization: tokens of shard 0.",
        ),
        Definition(
            "examples",
            "",
            "Examples of a benchmark that were scored.",
        ),
        Definition(
            "chance",
            "share",
            "Accuracy of guessing.",
        ),
        Definition(
            "acc",
            "share",
            "Share of examples answered rightly. Multiple choice: the ending with the highest summed log "
            "probability is the answer. Last word: every token of it is the likeliest one.",
        ),
        Definition(
            "acc_norm",
            "share",
            "As acc, with the mean instead of the sum of the log probabilities of the ending's tokens: llm.c's "
            "acc_norm, which the published HellaSwag figures are.",
        ),
        Definition(
            "acc_norm_chars",
            "share",
            "As acc, with the log probability a character of the ending: what lm-evaluation-harness calls acc_norm.",
        ),
        Definition(
            "acc_norm_bytes",
            "share",
            "As acc, with the log probability a byte of the ending: what lm-evaluation-harness calls acc_bytes.",
        ),
        Definition(
            "perplexity",
            "",
            "exp of the mean negative log probability a unit of text, the unit being named with it (word, token).",
        ),
        Definition(
            "centered",
            "",
            "CORE: mean over its tasks of (accuracy - chance) / (1 - chance).",
        ),
        Definition(
            "truncated",
            "sequences",
            "Sequences longer than the model's context, scored with the left end cut off.",
        ),
        Definition(
            "±",
            "share",
            "One standard error of a share p of n examples: sqrt(p (1 - p) / n).",
        ),
    ),
    "Data": (
        Definition(
            "total_bytes",
            "bytes",
            "Of the files of the source, as downloaded.",
        ),
        Definition(
            "documents",
            "",
            "Documents tokenized; each is preceded by one <|endoftext|>. Not known for ready-made shards.",
        ),
        Definition(
            "train_tokens",
            "tokens",
            "In all training shards, <|endoftext|> included.",
        ),
        Definition(
            "rows",
            "",
            "Rows of one stretch of input that could not be used and was left out.",
        ),
        Definition(
            "passes",
            "",
            "tokens / train_tokens: how often training went over the training set.",
        ),
    ),
    "The report's headline": (
        Definition(
            "flops",
            "FLOPs",
            "tokens × flops_per_token.",
        ),
        Definition(
            "hours",
            "h",
            "total_seconds / 3600 of the training stage: the other stages are not counted.",
        ),
        Definition(
            "gpu_hours",
            "h",
            "Wall time × GPUs, summed over sessions: gpu_seconds / 3600; not given on CPUs.",
        ),
        Definition(
            "dollars",
            "$",
            "gpu_hours × report.dollars_per_gpu_hour; not given without a price.",
        ),
    ),
}
METRICS_SHOWN = ("val_loss", "tokens_per_second", "mfu", "hours", "gpu_hours", "dollars", "train/grad_norm")
"""defined on every report's own page, besides the figures of its benchmarks"""


def definition(name: str) -> str:
    """What a number means.

    Raises:
        KeyError: it has no definition.
    """
    return _BY_NAME[name].meaning


def as_markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# What the numbers mean",
        "",
        "Every number that a metric, a manifest, the report, MLflow or Prefect shows. Made by",
        "`python -m gpt2.report.definitions`; edit gpt2/report/definitions.py, not this page.",
    ]
    for title, definitions in GROUPS.items():
        lines += ["", f"## {title}", "", "| name | unit | definition |", "|---|---|---|"]
        lines += [f"| `{each.name}` | {each.unit} | {each.meaning} |" for each in definitions]
    return "\n".join(lines) + "\n"


_BY_NAME = {each.name: each for definitions in GROUPS.values() for each in definitions}

if __name__ == "__main__":
    command(lambda: print(as_markdown(), end=""))
