"""The chapters of a report after its headline: tables, samples, and how to have it all again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt2.config.strict_yaml import dump
from gpt2.flops import flops_per_token
from gpt2.report.benchmarks import core_tasks, is_share, standard_error, title
from gpt2.report.compare import notes, value_of
from gpt2.report.definitions import METRICS_SHOWN, definition
from gpt2.report.document import Block, Code, Listing, Paragraph, Passage, Points, Table, Text
from gpt2.report.format import (
    DASH,
    dollars,
    duration,
    fixed,
    hours,
    percent,
    plural,
    rate,
    scientific,
    short,
    short_commit,
    size,
    whole,
)
from gpt2.report.reproduce import command, configuration
from gpt2.report.run import Run, Sample

SAMPLES_SHOWN = 12
ANOMALIES_SHOWN = 50
SAME_LOSS = 0.002  # nats a token; training scores in its own precision, evaluation may in another


def results(run: Run) -> list[Block]:
    """What was asked, what came out, and what others reach."""
    asked, facts, scored = run.train, run.train_facts, run.evaluate_facts
    published = run.published
    none = [DASH] * len(published)

    def beside(field: str, show: Callable[[Any], str]) -> list[str]:
        return [DASH if getattr(each, field) is None else show(getattr(each, field)) for each in published]

    peak = max(run.curves["train/lr"].values, default=None)
    rows: list[list[Text]] = [
        ["parameters", whole(asked.model.n_params()), whole(facts.n_params), *none],
        ["optimizer steps", whole(asked.max_steps), whole(facts.steps), *none],
        ["tokens a step", whole(asked.total_batch_size), whole(facts.tokens / max(facts.steps, 1)), *none],
        ["tokens", whole(asked.max_steps * asked.total_batch_size), whole(facts.tokens), *none],
        ["highest learning rate", rate(asked.optim.max_lr), DASH if peak is None else rate(peak), *none],
        [
            "validation loss (nats a token)",
            f"on {short(run.evaluate.val_tokens)} tokens",
            fixed(scored.val_loss, 4),
            *beside("val_loss", lambda value: fixed(value, 4)),
        ],
    ]
    for name, score in scored.scores.items():
        for figure, value in score.figures().items():
            digits = 2 if figure == "perplexity" else 4
            others = [fixed(value_of(run, each, name, figure), digits) for each in published]
            unit = f" a {score.unit}" if figure == "perplexity" and score.unit else ""
            label = f"{title(run, name)} {figure}{unit}"
            rows.append([label, plural(score.examples, "example"), _figure(figure, value, score.examples), *others])
    rows += [
        ["hours", DASH, hours(run.hours), *beside("hours", hours)],
        ["on", DASH, run.device, *beside("gpus", str)],
        ["dollars", _price(run), dollars(run.dollars), *beside("dollars", dollars)],
    ]
    head = ["", "asked", "came out", *(each.name for each in published)]
    table = Table(head, rows, numbers=True, strong=2)
    found = notes(run)
    return [table, *_by_the_harness(run), *([Points(found)] if found else [])]


def _by_the_harness(run: Run) -> list[Block]:
    """Its figures under its own names: another program than ours, on the exported model."""
    if run.harness is None:
        return []
    figures = run.harness.figures
    names = sorted({name for values in figures.values() for name in values})
    rows: list[list[Text]] = [
        [task, whole(run.harness.examples.get(task, 0)), *(_of(values, name) for name in names)]
        for task, values in figures.items()
    ]
    said = f"Measured by lm-evaluation-harness {run.harness.version} itself, on the exported model, by its own names:"
    return [Paragraph(said), Table(["task", "examples", *names], rows, numbers=True)]


def _of(values: Mapping[str, float], name: str) -> str:
    return fixed(values[name], 4) if name in values else DASH


def training(run: Run) -> list[Block]:
    """Every number of the training with how it is worked out."""
    facts, model = run.train_facts, run.train.model
    formula = "as the training stage counts them"
    if math.isclose(facts.flops_per_token, flops_per_token(model), rel_tol=1e-9):
        formula = (
            f"6 N + 6 L C T, as llm.c counts: 6 × {model.n_params():,} + 6 × {model.n_layer} × {model.n_embd:,} × "
            f"{model.block_size:,}; forward and backward, attention causal"
        )
    mfu = f"not given: the peak of {run.device} is not known"
    sessions = facts.all_sessions()
    if facts.mfu and len(sessions) > 1:
        mfu = "median over logged lines of tokens/s × FLOPs a token / (GPUs × peak), each with its session's devices"
    elif facts.mfu:
        peak = facts.tokens_per_second * facts.flops_per_token / (facts.mfu * facts.world_size)
        mfu = (
            f"tokens/s × FLOPs a token / (GPUs × peak): {facts.tokens_per_second:,.0f} × "
            f"{scientific(facts.flops_per_token)} / ({facts.world_size} × {peak / 1e12:,.0f} TFLOP/s)"
        )
    gpu_hours = " + ".join(f"{hours(s.seconds / 3600)} × {plural(s.gpus, 'GPU')}" for s in sessions)
    a_step = facts.tokens / max(facts.steps, 1)
    cost = _price(run) if run.dollars is None else f"GPU-hours × ${run.report.dollars_per_gpu_hour:g}"
    rows: list[list[Text]] = [
        ["tokens", whole(facts.tokens), f"{plural(facts.steps, 'step')} of {a_step:,.0f} tokens"],
        ["passes over the data", fixed(run.epochs, 3), f"tokens / {run.tokenize_facts.train_tokens:,}"],
        ["FLOPs a token", scientific(facts.flops_per_token), formula],
        ["FLOPs", scientific(run.flops), "tokens × FLOPs a token"],
        ["throughput", f"{whole(facts.tokens_per_second)} tokens/s", "median over logged lines"],
        ["MFU", percent(facts.mfu, 2), mfu],
        ["time in steps", duration(facts.train_seconds), "validation, benchmarks, checkpoints not counted"],
        ["hours", hours(run.hours), f"{facts.total_seconds:,.0f} s over all sessions, everything counted"],
        ["GPU-hours", short(run.gpu_hours), gpu_hours],
        ["dollars", dollars(run.dollars), cost],
        ["training loss", fixed(facts.train_loss, 4), "mean over the last 1 % of steps, nats a token"],
        ["precision", facts.arithmetic, plural(facts.world_size, "process", "processes")],
    ]
    return [Table(["", "value", "how it is worked out"], rows, strong=1)]


def samples(run: Run) -> list[Block]:
    if not run.samples:
        return [Paragraph("No samples were written during this run.")]
    chosen = spaced(run.samples, SAMPLES_SHOWN)
    sampling = run.train.sample
    among = f", among the {sampling.top_k} likeliest" if sampling.top_k else ""
    how = f"Up to {plural(sampling.tokens, 'token')} each, drawn at temperature {sampling.temperature:g}{among}."
    if any(sample.prompt for sample in chosen):
        how += " What the model was given to start from is in bold."
    if len(chosen) < len(run.samples):
        how += f" {len(chosen)} of {len(run.samples)} samples, evenly spaced."
    blocks: list[Block] = [Paragraph(how)]
    for sample in chosen:
        heading = f"step {sample.step:,} ({short(run.tokens_at(sample.step))} tokens)"
        blocks.append(Passage(heading, sample.prompt, sample.text.removeprefix(sample.prompt)))
    return blocks


def spaced(found: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of the samples, evenly spaced, the first and the last among them."""
    if len(found) <= count:
        return list(found)
    return [found[round(index * (len(found) - 1) / (count - 1))] for index in range(count)]


def irregularities(run: Run) -> list[Block]:
    """Whatever did not go as it should."""
    scored = run.evaluate_facts
    found: list[Text] = [
        (Code(name), f": not finite at {plural(count, 'logged step')}, left out of its curve.")
        for name, count in sorted(run.curves.nonfinite.items())
    ]
    found += [f"Input left out: {each}" for each in _skipped_input(run)]
    found += [f"{name} was not scored: {why}" for name, why in scored.skipped.items()]
    found += [
        f"{title(run, name)}: without {task} ({why})."
        for name in scored.scores
        if core_tasks(run, name)
        for task, why in run.benchmarks[name].left_out.items()
    ]
    if run.without_harness:
        found.append(f"lm-evaluation-harness could not be run: {run.without_harness}")
    difference = abs(scored.val_loss - run.train_facts.val_loss)
    if scored.val_tokens == run.train.val.tokens and difference > SAME_LOSS:
        found.append(
            f"Training measured a validation loss of {run.train_facts.val_loss:.4f} ({run.train_facts.precision}), the "
            f"evaluation stage {scored.val_loss:.4f} ({scored.precision}), on the same tokens."
        )
    if scored.val_tokens < run.evaluate.val_tokens:
        asked = f"{run.evaluate.val_tokens:,} were asked for"
        found.append(f"The validation shards hold {scored.val_tokens:,} tokens to score; {asked}.")
    found += [
        f"{name}: {plural(score.truncated, 'sequence')} longer than the context, scored with the left end cut off."
        for name, score in scored.scores.items()
        if score.truncated
    ]
    blocks: list[Block] = [Points(found)] if found else []
    if run.anomalies:
        blocks.append(_anomalies(run.anomalies))
    return blocks or [
        Paragraph("None: no step was skipped or rolled back, every number was finite, no input left out.")
    ]


def data(run: Run) -> list[Block]:
    source, tokens = run.download_facts, run.tokenize_facts
    train = sum(entry.split == "train" for entry in tokens.shards)
    val = len(tokens.shards) - train
    documents = whole(tokens.documents) if tokens.documents is not None else "not known: the shards were ready-made"
    scored = f"the loss is over the first {run.evaluate_facts.val_tokens:,}"
    rows: list[list[Text]] = [
        ["source", source.origin],
        ["downloaded", f"{plural(len(source.files), 'file')}, {size(source.total_bytes)}"],
        ["documents", documents],
        ["training tokens", f"{tokens.train_tokens:,} in {plural(train, 'shard')}"],
        ["validation tokens", f"{tokens.val_tokens:,} in {plural(val, 'shard')}; {scored}"],
        ["tokenizer", f"{tokens.tokenizer} ({tokens.backend})"],
    ]
    for name, facts in run.benchmarks.items():
        rows.append([title(run, name), f"{plural(facts.examples, 'example')} from {facts.origin}"])
    skipped = _skipped_input(run)
    blocks: list[Block] = [Table(["", ""], rows)]
    if skipped:
        blocks += [Paragraph("Input that could not be used and was left out:"), Points(skipped)]
    return blocks


def stages(run: Run) -> list[Block]:
    """Address, size, place and time of every stage."""
    rows: list[list[Text]] = []
    for stage in run.stages:
        where = stage.provenance
        rows.append(
            [
                Code(stage.request.address),
                whole(len(stage.manifest.files)),
                size(stage.bytes),
                duration(stage.seconds),
                where.host if where else DASH,
                _gpus(where.gpus) if where else DASH,
                Code(short_commit(where.commit)) if where and where.commit else DASH,
            ]
        )
    files, total = sum(len(stage.manifest.files) for stage in run.stages), sum(stage.bytes for stage in run.stages)
    rows.append(["together", whole(files), size(total), "", "", "", ""])
    blocks: list[Block] = [Table(["stage", "files", "bytes", "last session", "host", "its GPUs", "commit"], rows)]
    provenance = run.stage("train").provenance
    if provenance is not None:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(provenance.versions.items()))
        blocks.append(Paragraph(f"Training ran on {provenance.platform}, Python {provenance.python}, {versions}."))
    return blocks


def again(run: Run) -> list[Block]:
    """The command, and the whole configuration."""
    blocks: list[Block] = [Listing(command(run))]
    provenance = run.stage("train").provenance
    if provenance is not None and provenance.commit and provenance.commit.endswith("+"):
        blocks.append(Paragraph("The files that ran differed from that commit; how, is not recorded."))
    stage = Code(f"python -m gpt2.report store/{run.address}")
    cached = (
        "The same configuration gives the same addresses: what the store has of it is not run again. One stage alone: "
    )
    blocks.append(Paragraph((cached, stage)))
    blocks.append(Listing(dump(configuration(run)), folded="The whole configuration"))
    return blocks


def definitions(run: Run) -> list[Block]:
    figures = dict.fromkeys(name for score in run.evaluate_facts.scores.values() for name in score.figures())
    rows: list[list[Text]] = [[Code(name), definition(name)] for name in [*METRICS_SHOWN, *figures]]
    return [Table(["", "definition"], rows)]


def _price(run: Run) -> str:
    price = run.report.dollars_per_gpu_hour
    return f"${price:g} a GPU-hour" if price else "no price given"


def _figure(name: str, value: float, examples: int) -> str:
    """A benchmark's figure; a share of right answers with its standard error."""
    if name == "perplexity":
        return fixed(value, 2)
    if is_share(name):
        return f"{fixed(value, 4)} ± {fixed(standard_error(value, examples), 4)}"
    return fixed(value, 4)


def _skipped_input(run: Run) -> list[str]:
    found = []
    for each in run.tokenize_facts.skipped:
        group = "" if each.row_group is None else f", row group {each.row_group}"
        found.append(f"{each.file}{group}: {plural(each.rows, 'row')}, {each.reason}.")
    return found


def _anomalies(anomalies: Sequence[dict[str, Any]]) -> Table:
    """Whatever fields the training stage noted, a column each."""
    shown = anomalies[:ANOMALIES_SHOWN]
    columns = [name for name in dict.fromkeys(key for line in shown for key in line) if name != "time"]
    rows = [[_cell(line.get(name)) for name in columns] for line in shown]
    if len(anomalies) > len(shown):
        rows.append([f"and {len(anomalies) - len(shown):,} more", *[""] * (len(columns) - 1)])
    return Table(columns, rows)


def _cell(value: Any) -> str:
    if value is None:
        return DASH
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _gpus(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none"
