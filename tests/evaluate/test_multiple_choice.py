"""gpt2/multiple_choice.py, packing.py and examples.py: scoring prepared benchmarks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gpt2.benchmark.examples import Description, Example, Examples, Part, ScoredSequence, load, pack, save
from gpt2.config.train import ModelConfig
from gpt2.distributed import SINGLE_PROCESS, World
from gpt2.errors import UserError
from gpt2.evaluate.multiple_choice import predict, score, score_benchmark
from gpt2.evaluate.packing import Rows, batches, merge_alternatives, padded_width, sliding_windows, truncate
from gpt2.evaluate.sequence_losses import sequence_losses
from gpt2.model.gpt import GPT

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=48)


def tiny_model() -> GPT:
    model = GPT(TINY)
    model.init_weights(1)
    with torch.no_grad():
        model.transformer.wte.weight[: TINY.vocab_size] *= 20
    return model.eval()


def random_choices(examples: int, seed: int, longest: int = 40, ends: int = 4) -> Examples:
    """Multiple choice with contexts and ends of random tokens and lengths."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)

    def some(count: int) -> list[int]:
        return rng.integers(0, 50257, count).tolist()

    made = []
    for _ in range(examples):
        context = some(int(rng.integers(1, longest // 2)))
        ends_of = [some(int(rng.integers(1, longest // 2))) for _ in range(ends)]
        sequences = [ScoredSequence(context + end, len(end), chars=3 * len(end), bytes=4 * len(end)) for end in ends_of]
        made.append(Example(sequences, int(rng.integers(ends))))
    return pack(description(examples), made)


def description(examples: int, **more: object) -> Description:
    part = Part.model_validate({"name": "made", "form": "choice", "examples": examples, "chance": 0.25, **more})
    return Description(kind="made", prompt="llm.c", origin="test", parts=(part,))


def by_hand(model: GPT, tokens: list[int], scored: int) -> tuple[float, bool]:
    """Summed loss of the last `scored` tokens and whether all are the likeliest, straight from logits."""
    idx = torch.tensor([tokens])
    with torch.no_grad():
        logits, _ = model(idx[:, :-1])
    assert logits is not None
    ends = logits[0, -scored:].double()
    losses = F.cross_entropy(ends, idx[0, -scored:], reduction="none")
    return losses.sum().item(), bool((ends.argmax(1) == idx[0, -scored:]).all())


def test_sums_are_those_of_one_sequence_at_a_time() -> None:
    """Would catch: an end that is shifted by one, padding that is scored, sequences mixed up in a batch."""
    examples = random_choices(30, seed=12)
    model = tiny_model()
    sums = sequence_losses(model, examples, SINGLE_PROCESS, batch_tokens=300)
    for row, (begin, end) in enumerate(zip(examples.starts[:-1], examples.starts[1:], strict=True)):
        expected, _ = by_hand(model, examples.tokens[begin:end].tolist(), int(examples.scored[row]))
        assert sums.losses[row] == pytest.approx(expected, abs=1e-3)
    assert (sums.counts == examples.scored).all()


@pytest.mark.parametrize("batch_tokens", [1, 100, 5_000])
def test_same_picks_whatever_the_batch(batch_tokens: int) -> None:
    """Would catch: any influence of the padding or of the neighbours in a batch."""
    examples = random_choices(60, seed=13)
    expected = sequence_losses(tiny_model(), examples, SINGLE_PROCESS)
    sums = sequence_losses(tiny_model(), examples, SINGLE_PROCESS, batch_tokens=batch_tokens)
    np.testing.assert_allclose(sums.losses, expected.losses, atol=2e-4)
    everything = slice(0, 60)
    assert (predict(examples, sums, everything).by_sum == predict(examples, expected, everything).by_sum).all()
    assert (predict(examples, sums, everything).by_mean == predict(examples, expected, everything).by_mean).all()


def test_picks_by_sum_mean_characters_and_bytes_differ_as_they_should() -> None:
    """Would catch: acc and acc_norm mixed up, or a length other than the end's."""
    sequences = [ScoredSequence([1] * (1 + n), n, chars=1, bytes=1) for n in (1, 2, 3, 4)]
    examples = pack(description(1), [Example(sequences, 0)])
    sums = sequence_losses(tiny_model(), examples, SINGLE_PROCESS)
    lengths = [np.array(column, np.int32) for column in ([1, 1, 9, 1], [1, 1, 1, 20])]
    made = Examples(**{**vars(examples), "chars": lengths[0], "bytes": lengths[1]})
    sums = type(sums)(np.array([5.0, 6.0, 9.0, 9.5]), np.array([1, 2, 2, 2]), sums.greedy, sums.truncated)
    chosen = predict(made, sums, slice(0, 1))
    # 5, 6, 9, 9.5 | 5, 3, 4.5, 4.75 | 5, 6, 1, 9.5 | 5, 6, 9, 0.475
    assert [chosen.by_sum[0], chosen.by_mean[0], chosen.by_chars[0], chosen.by_bytes[0]] == [0, 1, 2, 3]


def test_a_known_answer_is_found() -> None:
    """Would catch: the highest loss taken for the best, or labels of another example."""
    model = tiny_model()
    examples = random_choices(40, seed=14)
    sums = sequence_losses(model, examples, SINGLE_PROCESS)
    told = Examples(**{**vars(examples), "labels": predict(examples, sums, slice(0, 40)).by_sum})
    result = score(told, sums)
    assert result.acc == 1.0 and result.acc_norm is not None and result.acc_norm < 1.0
    assert result.examples == 40 and result.chance == 0.25 and result.prompt == "llm.c"


def test_last_word_is_right_only_if_every_token_is_the_likeliest() -> None:
    """Would catch: a last word of several tokens counted right by its first or by its mean."""
    model = tiny_model()
    context = [5, 6, 7]
    greedy = list(context)
    for _ in range(3):
        with torch.no_grad():
            logits, _ = model(torch.tensor([greedy]))
        assert logits is not None
        greedy.append(int(logits[0, -1].argmax()))
    wrong_first = [*context, (greedy[3] + 1) % 50257, greedy[4]]
    wrong_last = [*greedy[:5], (greedy[5] + 1) % 50257]
    tokens = [(greedy, 3), (greedy[:4], 1), (wrong_first, 2), (wrong_last, 3)]
    examples = pack(
        description(4, form="last_word", chance=None, unit="word"), [Example([ScoredSequence(t, n)]) for t, n in tokens]
    )
    sums = sequence_losses(model, examples, SINGLE_PROCESS)
    result = score(examples, sums)
    assert sums.greedy.tolist() == [True, True, False, False]
    assert result.acc == 0.5 and result.acc_norm is None
    losses = [by_hand(model, t, n)[0] for t, n in tokens]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)


@pytest.mark.parametrize("stride", [1, 7, 24, 48, None])
@pytest.mark.parametrize("length", [2, 48, 49, 50, 97, 131])
def test_perplexity_scores_every_token_once(stride: int | None, length: int) -> None:
    """Would catch: tokens lost or doubled at the seams of sliding windows, or too little context before them."""
    model, context = tiny_model(), TINY.block_size
    tokens = np.random.default_rng(15).integers(0, 50257, length).tolist()
    examples = pack(
        description(1, form="perplexity", chance=None, unit="word", stride=stride),
        [Example([ScoredSequence(tokens, length - 1, units=10)])],
    )
    expected, done = 0.0, 1
    while done < length:  # as transformers' guide to perplexity does it
        reach = min(length, context + 1 if done == 1 else done + (stride or context))
        expected += by_hand(model, tokens[max(0, reach - context - 1) : reach], reach - done)[0]
        done = reach
    sums = sequence_losses(model, examples, SINGLE_PROCESS, batch_tokens=200)
    assert sums.counts.tolist() == [length - 1]
    assert score(examples, sums).perplexity == pytest.approx(math.exp(expected / 10), rel=1e-3)


def test_too_long_a_sequence_loses_its_left_end_and_is_counted() -> None:
    """Would catch: an end cut off instead of the context, or a cut that nobody hears of."""
    model = tiny_model()
    tokens = np.random.default_rng(16).integers(0, 50257, 90).tolist()
    examples = pack(description(1), [Example([ScoredSequence(tokens, 5), ScoredSequence(tokens[:20], 5)], 1)])
    sums = sequence_losses(model, examples, SINGLE_PROCESS)
    assert sums.losses[0] == pytest.approx(by_hand(model, tokens[-49:], 5)[0], abs=1e-3)
    assert sums.truncated.tolist() == [True, False]
    assert score(examples, sums).truncated == 1


def test_core_is_the_mean_of_centered_accuracies() -> None:
    """Would catch: an average over examples instead of tasks, or a task centered with another's chance."""
    one, two = random_choices(30, seed=17), random_choices(10, seed=18)
    parts = (
        Part(name="one", form="choice", examples=30, chance=0.25, by="mean"),
        Part(name="two", form="choice", examples=10, chance=0.5, by="mean"),
    )
    both = pack(
        Description(kind="core", prompt="core", origin="test", parts=parts),
        [*examples_of(one), *examples_of(two)],
    )
    model = tiny_model()
    result = score(both, sequence_losses(model, both, SINGLE_PROCESS))
    alone = [score(part, sequence_losses(model, part, SINGLE_PROCESS)).acc_norm for part in (one, two)]
    assert alone[0] is not None and alone[1] is not None
    assert result.centered == pytest.approx(((alone[0] - 0.25) / 0.75 + (alone[1] - 0.5) / 0.5) / 2)
    assert result.parts["two"].acc_norm == alone[1] and result.examples == 40


def examples_of(examples: Examples) -> list[Example]:
    made = []
    for number, (first, last) in enumerate(zip(examples.groups[:-1], examples.groups[1:], strict=True)):
        rows = range(first, last)
        made.append(
            Example(
                [
                    ScoredSequence(
                        examples.tokens[examples.starts[r] : examples.starts[r + 1]].tolist(), int(examples.scored[r])
                    )
                    for r in rows
                ],
                int(examples.labels[number]),
            )
        )
    return made


def joined(examples: Examples, context: int = 48) -> Rows:
    segments, _ = truncate(examples.starts, examples.scored, context)
    groups = np.searchsorted(examples.groups, segments.sequence, side="right")
    return merge_alternatives(examples.tokens, segments, groups, context)


def test_batches_hold_every_segment_once_and_keep_to_the_budget() -> None:
    """Would catch: a segment scored twice or never, and a batch that does not fit the GPU."""
    rows = joined(random_choices(100, seed=19))
    assert rows.first.tolist() == [0, *np.cumsum(rows.alternatives)[:-1]] and rows.alternatives.sum() == 400
    assert set(rows.alternatives) == {1, 4}  # both kinds occur
    found = batches(rows.width, 256, 48)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(rows.first)))
    for some in found:
        assert len(some) == 1 or len(some) * rows.width[some].max() <= 256
    positions = sum(len(some) * padded_width(int(rows.width[some].max()), 48) for some in found)
    assert rows.width.sum() <= positions < 1.33 * rows.width.sum()


@pytest.mark.parametrize(
    ("ends", "context"),
    [
        ([[7], [8], [9]], 30),  # nothing is left of an alternative but the token to predict
        ([[7, 8, 9], [7, 8, 5], [7]], 30),  # the ends begin alike too
        ([[7] * 12, [8] * 15, [9] * 9], 30),  # a row wider than the context
        ([[7] * 30, [8] * 30], 25),  # cut on the left, so that nothing is common
        ([[7] * 5, [7] * 5], 3),  # twice the same
    ],
)
def test_alternatives_in_one_row_are_what_they_are_alone(ends: list[list[int]], context: int) -> None:
    """Would catch: an alternative that sees another, positions that count on through the row, the first token of an
    end predicted from the wrong place."""
    beginning = np.random.default_rng(21).integers(0, 50257, context).tolist()
    examples = pack(description(1), [Example([ScoredSequence(beginning + end, len(end)) for end in ends])])
    model = tiny_model()
    sums = sequence_losses(model, examples, SINGLE_PROCESS)
    for row, end in enumerate(ends):
        expected, _ = by_hand(model, (beginning + end)[-49:], len(end))
        assert sums.losses[row] == pytest.approx(expected, abs=1e-3)


def test_a_common_beginning_is_read_once() -> None:
    """Would catch: rows that are joined on paper while the model still reads every alternative whole."""
    ends = [[7], [8], [9], [5]]
    examples = pack(description(1), [Example([ScoredSequence([*range(40), *end], 1) for end in ends])])
    with FlopCounterMode(display=False) as together:
        sequence_losses(tiny_model(), examples, SINGLE_PROCESS)
    single = pack(description(1), [Example([ScoredSequence([*range(40), 7], 1)])])
    with FlopCounterMode(display=False) as alone:
        sequence_losses(tiny_model(), single, SINGLE_PROCESS)
    head = 2 * TINY.padded_vocab_size * TINY.n_embd  # of each scored token
    assert together.get_total_flops() - 4 * head < 1.2 * (alone.get_total_flops() - head)


def test_windows_refuses_a_stride_it_cannot_walk() -> None:
    """Would catch: an endless loop on stride 0, and gaps between windows when the stride is above the context."""
    for stride in (0, 49):
        with pytest.raises(ValueError, match=f"stride is {stride}:"):
            sliding_windows(np.array([0, 100]), np.array([99]), 48, stride)


def test_saved_examples_are_the_same_bytes_and_load_again(tmp_path: Path) -> None:
    """Would catch: a time stamp in the archive, which would change the manifest of an unchanged benchmark."""
    examples = random_choices(5, seed=20)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(examples, tmp_path / name)
    assert (tmp_path / "a/examples.npz").read_bytes() == (tmp_path / "b/examples.npz").read_bytes()
    again = load(tmp_path / "a")
    assert again.description == examples.description
    assert (again.tokens == examples.tokens).all() and (again.labels == examples.labels).all()


def test_a_damaged_benchmark_says_so(tmp_path: Path) -> None:
    """Would catch: a traceback from zipfile for a file that a full disk cut off."""
    save(random_choices(5, seed=21), tmp_path)
    archive = tmp_path / "examples.npz"
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    archive.unlink()
    with pytest.raises(UserError, match="missing"):
        load(tmp_path)


def _scores(world: World, directory: Path) -> tuple[object, list[float]]:
    model = tiny_model()
    sums = sequence_losses(model, load(directory), world, batch_tokens=200)
    return score_benchmark(model, directory, world, batch_tokens=200), sums.losses.tolist()


@pytest.mark.slow
def test_one_and_four_processes_give_the_same_bits(tmp_path: Path) -> None:
    """Would catch: batches that depend on the number of processes, and examples split between them that are lost."""
    save(random_choices(50, seed=22), tmp_path)
    alone = run_processes(1, _scores, tmp_path)
    assert run_processes(4, _scores, tmp_path) == alone * 4
