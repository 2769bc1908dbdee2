"""The model card of an exported checkpoint: what is known of it, from the records that its training left.

Reads requests, manifests and metrics around the checkpoint folder; a folder without them, such as somebody else's
weights, gets a card that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gpt2.config.train import ModelConfig, TrainConfig
from gpt2.stage.directory import Provenance, is_finished
from gpt2.stage.facts import BenchmarkFacts, DownloadFacts, EvaluateFacts, Facts, Score, TokenizeFacts, TrainFacts
from gpt2.stage.manifest import MANIFEST, METRICS, PROVENANCE, REQUEST, Manifest, Request, read_model
from gpt2.stage.metrics import read_metrics

SIZES = {124_439_808: "124m", 354_823_168: "350m", 774_030_080: "774m", 1_557_611_200: "1558m"}


@dataclass(frozen=True)
class Record:
    """What the store knows of one checkpoint; None where it does not."""

    name: str
    """of the recipe, e.g. 124m; the size where the recipe is not known"""
    model: ModelConfig
    address: str | None = None
    """of the train stage"""
    step: int | None = None
    train: TrainConfig | None = None
    facts: TrainFacts | None = None
    """only for the final checkpoint of a finished training"""
    val_loss: float | None = None
    val_step: int | None = None
    """the optimizer step after which val_loss was measured"""
    evaluation: EvaluateFacts | None = None
    """only for the final checkpoint"""
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """benchmark of the evaluation -> tasks that its data lacked -> why"""
    corpus: DownloadFacts | None = None
    repository: str | None = None
    """of the corpus, on the Hugging Face Hub"""
    shards: TokenizeFacts | None = None
    provenance: Provenance | None = None


def gather(checkpoint: Path, model: ModelConfig, name: str | None = None) -> Record:
    """What is known of the model in folder `checkpoint`, whose architecture is `model`."""
    checkpoint = checkpoint.resolve()
    size = SIZES.get(model.n_params(), f"{model.n_params() / 1e6:.1f}m".replace(".", "-"))
    stage = checkpoint.parent.parent
    request = _request(stage)
    if request is None or request.stage != "train":
        return Record(name or size, model)
    store = stage.parent.parent
    step = int(checkpoint.name.rpartition("_")[2]) if checkpoint.name.startswith("step_") else None
    facts = _facts(stage, TrainFacts)
    final = facts is not None and (stage / facts.checkpoint).resolve() == checkpoint
    loss_step, loss = _last_val_loss(stage, step)
    shards = store / request.inputs.get("shards", "none")
    shards_request = _request(shards)
    corpus = store / shards_request.inputs.get("corpus", "none") if shards_request else None
    corpus_request = _request(corpus) if corpus else None
    source = corpus_request.config.get("source", {}) if corpus_request else {}
    evaluations = [d for d, r in _stages(store, "evaluate") if r.inputs.get("model") == request.address and final]
    evaluation = max(evaluations, key=lambda d: (d / MANIFEST).stat().st_mtime, default=None)
    reports = [r for _, r in _stages(store, "report") if r.inputs.get("model") == request.address]
    return Record(
        name=name or next((str(r.config["name"]) for r in reports if "name" in r.config), size),
        model=model,
        address=request.address,
        step=step,
        train=TrainConfig.model_validate(request.config),
        facts=facts if final else None,
        val_loss=facts.val_loss if final and facts else loss,
        val_step=facts.steps if final and facts else loss_step,
        evaluation=_facts(evaluation, EvaluateFacts) if evaluation else None,
        left_out=_left_out(store, evaluation) if evaluation else {},
        corpus=_facts(corpus, DownloadFacts) if corpus else None,
        repository=source.get("repo") if isinstance(source, dict) else None,
        shards=_facts(shards, TokenizeFacts),
        provenance=read_model(stage / PROVENANCE, Provenance) if final and (stage / PROVENANCE).exists() else None,
    )


def render(record: Record, *, tokenizer: bool = True) -> str:
    """README.md: YAML front matter as the Hub reads it, then Markdown.

    Args:
        tokenizer: whether the folder holds GPT-2's tokenizer.
    """
    front = yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True)
    sections = [
        f"# gpt2-{record.name}\n\n{_opening(record)}",
        _section("Results", ["", "value"], _results(record)),
        _section("Recipe", ["", "value"], _recipe(record)),
        _use(tokenizer),
        _limits(record),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(record: Record) -> dict[str, Any]:
    front: dict[str, Any] = {
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2"],
    }
    if record.repository:
        front["datasets"] = [record.repository]
    results = []
    for name, score in (record.evaluation.scores if record.evaluation else {}).items():
        metrics = [
            {"type": figure.type, "name": f"{figure.type}: {figure.how}", "value": round(figure.value, 5)}
            for figure in _figures(score, record.left_out.get(name, {}))
        ]
        if metrics:
            task = {"type": "text-generation"}
            results.append({"task": task, "dataset": {"type": name, "name": name}, "metrics": metrics})
    if results:
        front["model-index"] = [{"name": f"gpt2-{record.name}", "results": results}]
    return front


def _opening(record: Record) -> str:
    model = record.model
    what = (
        f"GPT-2's architecture with {model.n_params():,} parameters: {model.n_layer} layers, {model.n_head} heads, "
        f"width {model.n_embd}, {model.block_size:,} tokens of context, {model.vocab_size:,} tokens of vocabulary."
    )
    if record.train is None:
        return f"{what} Converted from weights that carry no record of their training."
    data = f" on {record.corpus.origin}" if record.corpus else ""
    begun = f"from {record.train.init_from}" if record.train.init_from else "from random weights"
    steps = f" for {record.step:,} optimizer steps" if record.step is not None else ""
    of = f" of {record.train.max_steps:,}" if record.step is not None and record.step < record.train.max_steps else ""
    return f"{what} Trained {begun}{data}{steps}{of}."


def _results(record: Record) -> list[tuple[str, str]]:
    rows = []
    if record.evaluation:
        rows.append(
            (
                f"validation loss, nats a token over {record.evaluation.val_tokens:,} tokens",
                f"{record.evaluation.val_loss:.4f}",
            )
        )
    elif record.val_loss is not None:
        rows.append((f"validation loss while training, after step {record.val_step:,}", f"{record.val_loss:.4f}"))
    for name, score in (record.evaluation.scores if record.evaluation else {}).items():
        chance = f", chance {score.chance:.3g}" if score.chance is not None else ""
        prompt = f", prompt: {score.prompt}" if score.prompt else ""
        for figure in _figures(score, record.left_out.get(name, {})):
            of = f"{figure.how}; {score.examples:,} examples{chance}{prompt}"
            rows.append((f"{name} {figure.type} ({of})", f"{figure.value:.4f}"))
    return rows


class _Figure(NamedTuple):
    type: str
    how: str
    value: float


def _figures(score: Score, lacking: Mapping[str, str]) -> list[_Figure]:
    """The figures under the names that others know them by, and how each is made: acc_norm is one thing to llm.c and
    another to lm-evaluation-harness, and a card is read beside cards that were made with the one or the other."""
    tasks = f"{len(score.parts)} of {len(score.parts) + len(lacking)} tasks"
    without = f", without {', '.join(lacking)}" if lacking else ""
    acc = "every token of the answer is the likeliest" if score.perplexity is not None else "by summed log probability"
    token, character, byte = (f"by log probability a {unit}" for unit in ("token", "character", "byte"))
    if score.prompt == "harness":
        names = {
            "acc_norm": ("acc_norm_tokens", token),
            "acc_norm_chars": ("acc_norm", f"{character}, lm-evaluation-harness's acc_norm"),
            "acc_norm_bytes": ("acc_bytes", f"{byte}, lm-evaluation-harness's acc_bytes"),
        }
    else:
        names = {
            "acc_norm": ("acc_norm", f"{token}, llm.c's acc_norm"),
            "acc_norm_chars": ("acc_norm_chars", character),
            "acc_norm_bytes": ("acc_norm_bytes", byte),
        }
    names |= {
        "acc": ("acc", acc),
        "perplexity": ("perplexity", f"a {score.unit or 'token'}"),
        "centered": ("centered", f"CORE over {tasks}{without}: mean of (accuracy - chance) / (1 - chance)"),
    }
    return [_Figure(*names[name], value) for name, value in score.figures().items()]


def _recipe(record: Record) -> list[tuple[str, str]]:
    train, facts = record.train, record.facts
    if train is None:
        return []
    optim = train.optim
    rows = [
        ("tokens trained on", f"{(record.step or 0) * train.total_batch_size:,}" if record.step is not None else ""),
        ("tokens a step", f"{train.total_batch_size:,}"),
        ("optimizer", f"AdamW, betas {optim.betas[0]} and {optim.betas[1]}, eps {optim.eps:g}"),
        ("weight decay", f"{optim.weight_decay:g}, on tensors of two or more dimensions"),
        (
            "learning rate",
            f"{optim.max_lr:g} to {optim.min_lr:g}, {optim.schedule}, {optim.warmup_steps:,} warm-up steps",
        ),
        ("gradient norm clipped at", f"{optim.grad_clip:g}" if optim.grad_clip else "not clipped"),
        ("seed", str(train.seed)),
        ("training text", f"{record.shards.train_tokens:,} tokens" if record.shards else ""),
    ]
    if facts:
        mfu = f", {facts.mfu:.1%} MFU" if facts.mfu is not None else ""
        rows += [
            ("trained on", f"{facts.device}, {facts.arithmetic}"),
            ("hours", f"{facts.total_seconds / 3600:.2f}"),
            ("speed", f"{facts.tokens_per_second:,.0f} tokens/s{mfu}"),
        ]
    if record.provenance:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(record.provenance.versions.items()))
        rows += [("code", f"commit {record.provenance.commit}" if record.provenance.commit else ""), ("with", versions)]
    rows.append(("address", record.address or ""))
    return [row for row in rows if row[1]]


def _section(title: str, header: list[str], rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _use(tokenizer: bool) -> str:
    if not tokenizer:
        return "## Use\n\nThe vocabulary is not GPT-2's, so no tokenizer is included; the model takes token ids."
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        'generator = pipeline("text-generation", model="path/to/this/folder")\n'
        'print(generator("Once upon a time", max_new_tokens=50)[0]["generated_text"])\n```'
    )


def _limits(record: Record) -> str:
    data = "the web text" if record.repository else "the text"
    return (
        "## Limits\n\nA pretrained language model and no more: it continues text, follows no instructions, states what "
        f"is false as fluently as what is true, and repeats the biases of {data} it was trained on."
    )


def _request(stage: Path) -> Request | None:
    return read_model(stage / REQUEST, Request) if (stage / REQUEST).exists() else None


def _facts(stage: Path, kind: type[Facts]) -> Any:
    """The facts of a finished stage, or None."""
    if not (stage / MANIFEST).exists():
        return None
    facts = read_model(stage / MANIFEST, Manifest).facts
    return facts if isinstance(facts, kind) else None


def _left_out(store: Path, evaluation: Path) -> dict[str, dict[str, str]]:
    """What the benchmarks of an evaluation lacked, by their names there."""
    request = _request(evaluation)
    roles = {role: store / address for role, address in request.inputs.items()} if request else {}
    found = {role.removeprefix("benchmark:"): _facts(path, BenchmarkFacts) for role, path in roles.items()}
    return {name: facts.left_out for name, facts in found.items() if facts is not None}


def _stages(store: Path, stage: str) -> Iterator[tuple[Path, Request]]:
    """The finished stages of one kind in the store."""
    for path in sorted(store.glob(f"{stage}/*/{MANIFEST}")):
        request = _request(path.parent)
        if request is not None and is_finished(path.parent):
            yield path.parent, request


def _last_val_loss(stage: Path, step: int | None) -> tuple[int | None, float | None]:
    found: tuple[int | None, float | None] = (None, None)
    for line in read_metrics(stage / METRICS):
        if "val/loss" in line and (step is None or line["step"] <= step):
            found = (line["step"], line["val/loss"])
    return found
