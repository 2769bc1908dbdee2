"""What a report says: from a run to a document, and to the few numbers that stand for it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from gpt2.report import chapters
from gpt2.report.benchmarks import is_share, like_guessing, main_figure, standard_error, task, title
from gpt2.report.compare import VAL_LOSS, reference
from gpt2.report.document import Chapter, Code, Document, Gallery, Picture, Text, Tile
from gpt2.report.drawing import Plot
from gpt2.report.format import dollars, duration, fixed, percent, plural, short, short_commit, significant, whole
from gpt2.report.run import Run
from gpt2.stage.facts import Score


def headline(run: Run) -> dict[str, float | str | None]:
    """The run in a few numbers, by name; worked out here once for the page, the manifest, Prefect and MLflow."""
    facts = run.train_facts
    return {
        "val_loss": run.evaluate_facts.val_loss,
        "train_loss": facts.train_loss,
        **{
            f"{name}/{figure}": value
            for name, score in run.evaluate_facts.scores.items()
            for figure, value in score.figures().items()
        },
        "n_params": facts.n_params,
        "steps": facts.steps,
        "tokens": facts.tokens,
        "flops": run.flops,
        "tokens_per_second": facts.tokens_per_second,
        "mfu": facts.mfu,
        "hours": run.hours,
        "gpu_hours": run.gpu_hours,
        "dollars": run.dollars,
        "device": facts.device,
    }


def document(run: Run, plots: Sequence[Plot]) -> Document:
    """Lay the report out."""
    return Document(
        title=run.report.title,
        subtitle=_subtitle(run),
        tiles=_tiles(run),
        lead=lead(run),
        chapters=[
            Chapter("Curves", [Gallery([Picture(plot.name, plot.title, plot.caption) for plot in plots])]),
            Chapter("Asked, came out, published", chapters.results(run)),
            Chapter("Training in numbers", chapters.training(run)),
            Chapter("Samples of text over training", chapters.samples(run)),
            Chapter("Irregularities", chapters.irregularities(run)),
            Chapter("Data", chapters.data(run)),
            Chapter("Where it ran", chapters.stages(run)),
            Chapter("How to do it again", chapters.again(run)),
            Chapter("What the numbers mean", chapters.definitions(run)),
        ],
    )


def lead(run: Run) -> str:
    """One paragraph in plain words."""
    facts, scored = run.train_facts, run.evaluate_facts
    start = "from random weights" if run.train.init_from is None else f"from the weights of {run.train.init_from}"
    cost = ""
    if run.gpu_hours is not None:
        cost = f": {significant(run.gpu_hours)} GPU-hours" + (
            f", {dollars(run.dollars)}" if run.dollars is not None else ""
        )
    sentences = [
        f"A GPT-2 with {short(facts.n_params, 4)} parameters was trained {start} on {short(facts.tokens)} tokens of "
        f"{_origin(run)} ({_passes(run)}) in {duration(facts.total_seconds)} on {run.device}{cost}.",
        f"On {whole(scored.val_tokens)} tokens of text that it was not trained on, its loss is "
        f"{fixed(scored.val_loss, 4)} nats a token, a perplexity of {fixed(perplexity(scored.val_loss), 1)}"
        f"{_against(run)}.",
    ]
    for name, score in scored.scores.items():
        figure = main_figure(run, name, score)
        if figure is not None and is_share(figure):
            sentences.append(_answers(run, name, score, figure))
    return " ".join(sentences)


def _answers(run: Run, name: str, score: Score, figure: str) -> str:
    """A benchmark in a sentence."""
    share, other = score.figures()[figure], reference(run, name, figure)
    told = []
    if score.chance is not None:
        chance = percent(score.chance)
        told.append(
            f"not to be told from guessing ({chance})" if like_guessing(share, score) else f"guessing gives {chance}"
        )
    if other is not None:
        told.append(f"{other[0].name} reaches {percent(other[1])}")
    error = percent(standard_error(share, score.examples))
    return (
        f"On {title(run, name)}{task(run, name)} it answers {percent(share)} (± {error}) of "
        f"{plural(score.examples, 'question')} rightly" + (f"; {', '.join(told)}" if told else "") + "."
    )


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 50 else math.inf


def _subtitle(run: Run) -> Text:
    parts: list[str] = ["recipe ", Code(run.report.name), ", ", Code(run.address)]
    provenance = run.stage("train").provenance
    if provenance is not None:
        day = time.gmtime(provenance.ended)
        parts.append(f", trained {day.tm_mday} {time.strftime('%B %Y', day)}")
        if provenance.commit:
            parts += [" at commit ", Code(short_commit(provenance.commit))]
    return tuple(parts)


def _tiles(run: Run) -> list[Tile]:
    facts, loss = run.train_facts, reference(run, VAL_LOSS)
    beside = f"{loss[0].name}: {loss[1]:.4f}" if loss else "nats a token"
    tiles = [Tile("validation loss", fixed(run.evaluate_facts.val_loss, 4), beside)]
    for name, score in run.evaluate_facts.scores.items():
        figure = main_figure(run, name, score)
        if figure is not None:
            value = fixed(score.figures()[figure], 2 if figure == "perplexity" else 4)
            tiles.append(Tile(title(run, name), value, _beside(run, name, score, figure)))
    tiles += [
        Tile("tokens", short(facts.tokens), plural(facts.steps, "step")),
        Tile("training time", duration(facts.total_seconds), run.device),
    ]
    if run.gpu_hours is not None and run.dollars is not None:
        per_hour = f"{significant(run.gpu_hours)} GPU-hours at ${run.report.dollars_per_gpu_hour:g}"
        tiles.append(Tile("cost", dollars(run.dollars), per_hour))
    elif run.gpu_hours is not None:
        tiles.append(Tile("GPU-hours", significant(run.gpu_hours), "no price given"))
    mfu = f"{percent(facts.mfu)} MFU" if facts.mfu is not None else "median over logged lines"
    tiles.append(Tile("tokens a second", short(facts.tokens_per_second), mfu))
    return tiles


def _beside(run: Run, name: str, score: Score, figure: str) -> str:
    """What makes a benchmark's figure readable: how sure it is, and somebody else's, or what guessing gives."""
    value, other = score.figures()[figure], reference(run, name, figure)
    parts = []
    if is_share(figure):
        parts.append(f"± {standard_error(value, score.examples):.4f}")
    if is_share(figure) and like_guessing(value, score):
        parts.append(f"not to be told from guessing ({fixed(score.chance, 4)})")
    elif other is None and score.chance is not None:
        parts.append(f"guessing: {score.chance:.4f}")
    if other is not None:
        parts.append(f"{other[0].name}: {fixed(other[1], 2 if figure == 'perplexity' else 4)}")
    if not is_share(figure):
        parts.insert(0, f"{figure} a {score.unit}" if figure == "perplexity" and score.unit else figure)
    return "; ".join(parts)


def _origin(run: Run) -> str:
    """The source without its revision, which the chapter on data gives in full."""
    return run.download_facts.origin.partition("@")[0]


def _passes(run: Run) -> str:
    return "one pass" if 0.995 <= run.epochs < 1.005 else f"{fixed(run.epochs, 2)} passes over the training set"


def _against(run: Run) -> str:
    published = reference(run, VAL_LOSS)
    if published is None:
        return ""
    difference = run.evaluate_facts.val_loss - published[1]
    where = "below" if difference < 0 else "above"
    return f"; that is {fixed(abs(difference), 3)} {where} {published[0].name} ({published[1]:.4f})"
