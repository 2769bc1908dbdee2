"""Sampling: the cache against recomputing, determinism, where texts end, and what may be shown when."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import sample as bench_sample
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.generate import cuda_graph as recorded
from gpt2.generate import sample
from gpt2.generate.cuda_graph import RecordedSteps
from gpt2.generate.generation import Choice, Generation, RecomputingReader, generate
from gpt2.generate.sample import TextPieces, converse, encode_prompt, stream, stream_batch
from gpt2.model.checkpoint import save_model
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import CachedReader
from gpt2.model.load import pick_device
from gpt2.tokenizer import EOT, gpt2_encoding


def small_model(vocab_size: int = 211, block_size: int = 32) -> GPT:
    """Weights four times the usual, so that the next token depends clearly on the ones before."""
    model = GPT(ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=block_size, vocab_size=vocab_size))
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="module")
def text_model() -> GPT:
    return small_model(vocab_size=50257)


def test_cached_logits_equal_recomputed_ones(model: GPT) -> None:
    """A position, mask or cache slot that is off by one."""
    tokens = random.Random(7).choices(range(211), k=32)
    for first in (1, 9, 31):
        cached, plain = CachedReader(model, 1, 32), RecomputingReader(model, 1)
        torch.testing.assert_close(cached.read([0], [tokens[:first]]), plain.read([0], [tokens[:first]]))
        for position in range(first, 32):
            ours = cached.step([tokens[position]], [position])
            torch.testing.assert_close(ours, plain.step([tokens[position]], [position]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "choice",
    [Choice(temperature=0), Choice(), Choice(temperature=0.7, top_k=5), Choice(top_p=0.7), Choice(top_k=20, top_p=0.5)],
    ids=str,
)
def test_the_same_text_with_and_without_cache_past_the_window(model: GPT, choice: Choice) -> None:
    """A window that slides differently, or keys kept from positions that have moved."""
    for length in (1, 31, 32, 33, 70):
        prompt = list(range(length))
        texts = [list(Generation(model, [prompt], 80, choice, seeds=[3], cache=cache)) for cache in (True, False)]
        assert texts[0] == texts[1], f"prompt of {length}"


def test_a_prompt_in_a_batch_gets_what_it_gets_alone(model: GPT) -> None:
    """Rows of different lengths that see each other's padding, or share their dice."""
    prompts = [[1], [2, 3, 4, 5], list(range(30)), list(range(40)), [1]]
    batch = list(Generation(model, prompts, 90, Choice(), seeds=range(5, 10), stop=[7, 8, 9, 10]))
    alone = [generate(model, prompt, 90, seed=5 + i, stop=[7, 8, 9, 10]) for i, prompt in enumerate(prompts)]
    assert [[step[row] for step in batch if step[row] is not None] for row in range(5)] == alone
    assert alone[0] != alone[4], "same prompt, other seed"
    assert any(len(text) < 90 for text in alone), "some text must have met its stop for this test to mean something"
    for text in alone:
        assert len(text) == 90 or text[-1] in (7, 8, 9, 10)
        assert not {7, 8, 9, 10} & set(text[:-1])


def test_sampling_leaves_the_global_random_state_and_the_weights(model: GPT) -> None:
    """Sampling in the middle of training that changes the training after it."""
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    first = generate(model, [1, 2, 3], 40, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    torch.rand(5)
    assert generate(model, [1, 2, 3], 40, seed=11) == first
    assert generate(model, [1, 2, 3], 40, seed=12) != first


def test_picks_follow_the_distribution() -> None:
    """A shifted cumulative sum: every token taken for its neighbour."""
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()
    n = 20_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Choice().pick(logits.expand(n, 4), u).bincount(minlength=4) / n
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.1, 0.25, 0.15]), atol=0.012, rtol=0)
    # the nucleus of 0.7 is the two likeliest, 2/3 to 1/3; so are the top two
    for choice in (Choice(top_p=0.7), Choice(top_k=2)):
        drawn = choice.pick(logits.expand(n, 4), u).bincount(minlength=4) / n
        torch.testing.assert_close(drawn, torch.tensor([2 / 3, 0, 1 / 3, 0]), atol=0.012, rtol=0)


def test_limits_that_limit_nothing_change_nothing() -> None:
    """top_p 1 given as a number, as MLflow's parameters must, and another text for the same seed."""
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    u = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for choice in (Choice(top_p=1.0), Choice(top_k=20), Choice(top_k=99, top_p=1.0)):
        assert torch.equal(choice.pick(logits, u), Choice().pick(logits, u))


def test_picks_at_the_edges_have_probability() -> None:
    """u = 0 or nearly 1 that takes a token of probability 0 or one past the end."""
    logits = torch.tensor([[-float("inf"), 1.0, 2.0, -float("inf")]])
    for u in (0.0, 1 - 2**-53):
        for choice in (Choice(), Choice(top_k=3), Choice(top_p=1.0), Choice(top_p=1e-9), Choice(temperature=1e-3)):
            assert choice.pick(logits, torch.tensor([u], dtype=torch.float64)).item() in (1, 2), (u, choice)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}])
def test_a_choice_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"temperature|top_k|top_p"):
        Choice(**wrong)  # type: ignore[arg-type]


def test_prompts_that_the_model_cannot_read(model: GPT) -> None:
    """An index error from inside the embedding instead of a message."""
    with pytest.raises(UserError, match="without tokens"):
        generate(model, [], 3)
    with pytest.raises(UserError, match="token 211, the model knows 0 to 210"):
        generate(model, [1, 211], 3)
    assert generate(model, [1], 0) == []


# ---------------------------------------------------------------------------------------------------------- as text


def test_pieces_are_whole_characters() -> None:
    """Half a character shown as two replacement signs: GPT-2's tokens split emoji and Chinese signs."""
    text = "naïve 🤖 東京 — ok"
    pieces = TextPieces()
    shown = [pieces.add(token) for token in gpt2_encoding().encode_ordinary(text)]
    assert "".join(shown) + pieces.rest() == text
    assert not any("\ufffd" in piece for piece in shown)
    cut = TextPieces()
    assert cut.add(gpt2_encoding().encode_ordinary("🤖")[0]) == ""
    assert cut.rest() == "\ufffd"


def test_nothing_of_a_stop_string_is_shown() -> None:
    """The first half of a stop string that was shown before the second half came."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        text = "".join(rng.choices("ab\n", k=30))
        stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 5))) for _ in range(2)]
        whole = next((n for n in range(31) if any(stop in text[:n] for stop in stops)), 30)  # the first to be complete
        wanted = text[: min((at for at in (text[:whole].find(stop) for stop in stops) if at >= 0), default=30)]
        pieces = TextPieces(stops)
        shown = ""
        for character in text:
            shown += pieces.add(gpt2_encoding().encode_single_token(character))
            assert wanted.startswith(shown)
        assert shown + ("" if pieces.ended else pieces.rest()) == wanted, (text, stops)


def test_text_ends_at_the_end_of_the_document() -> None:
    pieces = TextPieces(["zebra"])
    shown = [pieces.add(token) for token in [*gpt2_encoding().encode_ordinary("a ze"), EOT, 64]]
    assert "".join(shown) == "a ze", "what was held back for a stop string belongs to the text"
    assert pieces.ended


def test_streams_agree_with_ids(text_model: GPT) -> None:
    ids = generate(text_model, encode_prompt("Hello"), 40, seed=5, top_k=50, stop=[EOT])
    text = gpt2_encoding().decode([token for token in ids if token != EOT])
    assert "".join(stream(text_model, "Hello", 40, seed=5, top_k=50)) == text
    rows = ["", ""]
    for row, piece in stream_batch(text_model, ["", "Hello"], 40, seed=4, top_k=50):
        rows[row] += piece
    assert rows[1] == text, "prompt i of a batch is alone with seed + i"
    stop = text[10:13]
    assert "".join(stream(text_model, "Hello", 40, seed=5, top_k=50, stop=[stop])) == text[: text.index(stop)]


def test_an_empty_prompt_begins_a_document() -> None:
    assert encode_prompt("") == [EOT]
    assert encode_prompt("<|endoftext|>Hi") == [EOT, *gpt2_encoding().encode_ordinary("Hi")]


def test_a_conversation_keeps_what_was_said() -> None:
    asked: list[str] = []

    def answer(text: str):  # type: ignore[no-untyped-def]
        asked.append(text)
        yield " fine"

    written: list[str] = []
    converse(iter(["How are you?", "And now?"]), written.append, answer, chat=True)
    assert asked[1] == "You: How are you?\nGPT-2: fine\nYou: And now?\nGPT-2:"
    assert "".join(written) == " fine\n fine\n"


@pytest.mark.slow
def test_command_line(text_model: GPT, tmp_path: Path) -> None:
    """The same seed gives the same text in another process; a file of prompts; a missing folder."""
    save_model(tmp_path / "model", text_model)

    def run(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gpt2.generate", *arguments],
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )

    folder = str(tmp_path / "model")
    once = run(folder, "--prompt", "Once", "--tokens", "20", "--seed", "3", "--temperature", "1")
    assert once.returncode == 0, once.stderr
    assert once.stdout == "Once" + "".join(stream(text_model, "Once", 20, seed=3)) + "\n"
    (tmp_path / "prompts.txt").write_text("One\nTwo\n")
    many = run(folder, "--file", str(tmp_path / "prompts.txt"), "--tokens", "5")
    assert "--- 1\nOne" in many.stdout
    assert "--- 2\nTwo" in many.stdout
    chat = run(folder, "--chat", "--tokens", "5", typed="Hello\nAgain\n")
    assert chat.returncode == 0, chat.stderr
    missing = run(str(tmp_path / "none"), "--prompt", "x")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")
    assert missing.stderr.count("\n") == 1


class Replay:
    """A CUDA graph without a GPU: replaying it runs the recorded step again."""

    def __init__(self, steps: RecordedSteps) -> None:
        self.steps = steps

    def replay(self) -> None:
        self.steps._chosen.copy_(self.steps._step())


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Generation], Generation]:
    """Lets a generation on a CPU sample through RecordedSteps."""

    class Nothing:
        def __init__(self, *_: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    for name in ("Stream", "Event", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)

    def recording(generation: Generation) -> Generation:
        assert isinstance(generation.reader, CachedReader)
        steps = generation.recorded = RecordedSteps(generation.reader, generation.choice.pick, generation.dice)
        steps._graph = Replay(steps)  # type: ignore[assignment]
        return generation

    return recording


def test_steps_launched_ahead_change_no_text(record: Callable[[Generation], Generation]) -> None:
    """A step that was launched ahead and fed another token; one that goes on past the end of a window; rows that have
    ended, from inside or outside, or are full at different times."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(40):
        block_size, rows, n_tokens = rng.choice([2, 3, 5, 16]), rng.randint(1, 6), rng.randint(1, 12)
        model = small_model(block_size=block_size)
        prompts = [[rng.randrange(211) for _ in range(rng.randint(1, block_size + 4))] for _ in range(rows)]
        choice = rng.choice([Choice(), Choice(temperature=0), Choice(0.7, top_k=5), Choice(top_p=0.9)])
        stop = rng.sample(range(211), rng.choice([0, 40]))
        ends = {rng.randint(1, n_tokens): rng.randrange(rows) for _ in range(rng.choice([0, 2]))}

        def text(recorded: bool) -> list[list[int | None]]:
            generation = Generation(model, prompts, n_tokens, choice, seeds=range(rows), stop=stop)  # noqa: B023
            found = []
            for tokens in record(generation) if recorded else generation:
                found.append(tokens)
                if len(found) in ends:  # noqa: B023
                    generation.ended[ends[len(found)]] = True  # noqa: B023
            return found

        assert text(True) == text(False), (block_size, prompts, choice, stop, ends)


def test_what_a_recording_writes_to_lives_as_long(
    record: Callable[[Generation], Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph keeps addresses and no tensors: buffers that nobody owns any more become somebody else's memory."""

    class Few:
        def __init__(self, reader: CachedReader) -> None:
            self.reader = reader

        def step(self, idx: Tensor, positions: Tensor) -> Tensor:
            return self.reader.masked_step(idx.view(-1, 1), positions, self.reader.capacity)

    made: list[weakref.ref[Few]] = []

    def few(reader: CachedReader) -> Few:
        made.append(weakref.ref(one := Few(reader)))
        return one

    monkeypatch.setattr(recorded, "fits", lambda reader: True)
    monkeypatch.setattr(recorded, "FewRows", few)
    generation = record(Generation(small_model(), [[1], [2]], 5, Choice(), seeds=[1, 2]))
    reader = weakref.ref(generation.reader)
    del generation.reader
    gc.collect()
    assert made[0]() is not None and reader() is not None


def test_a_generation_is_read_once() -> None:
    """Tokens of the first reading told again, or a cache that is written past its end."""
    generation = Generation(small_model(), [[1]], 3, Choice(), seeds=[1])
    assert len(list(generation)) == 3
    with pytest.raises(RuntimeError, match="read once"):
        list(generation)
    for nothing in (0, -1, -5):
        assert list(Generation(small_model(), [[1]], nothing, Choice(), seeds=[1], cuda_graph=True)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("choice", [Choice(), Choice(0.7, top_k=50), Choice(top_p=0.9), Choice(temperature=0)])
@pytest.mark.parametrize("more", [0, 2])  # 3 rows have kernels of their own, 5 have torch's
def test_recorded_steps_write_what_eager_and_recomputed_ones_do(choice: Choice, more: int) -> None:
    """A CUDA graph that reads the tokens it was recorded with, or writes where another one reads; batched products that
    mask the wrong positions."""
    model = small_model(block_size=64).cuda()
    prompts = [[5] * 3, [7] * 20, [9] * 63, *[[2] * 10] * more]  # the third window is full at once, the others later

    def begun(**how: bool) -> Generation:
        return Generation(model, prompts, 150, choice, seeds=range(5, 8 + more), **how)

    def texts(*generations: Generation) -> list[list[list[int | None]]]:
        found: list[list[list[int | None]]] = [[] for _ in generations]
        for turn in zip(*generations, strict=True):  # in turns, so that they may disturb each other
            for text, tokens, generation in zip(found, turn, generations, strict=True):
                text.append(tokens)
                generation.ended[1] |= len(text) == 20
        return found

    one, two = texts(begun(cuda_graph=True), begun(cuda_graph=True))
    assert one == two == texts(begun())[0] == texts(begun(cache=False))[0]
    assert len(one) == 150 and [row[1] is None for row in one] == [False] * 20 + [True] * 130


def test_a_cached_token_costs_one_token_and_not_the_window() -> None:
    """A cache that is there but still reads the whole window again. The work is counted, not timed: how fast a machine
    is at long and at short products says nothing of the cache."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=1024, vocab_size=500))
    model.init_weights(seed=1)
    window = [1] * 1023
    cached, plain = CachedReader(model, 1, 1024), RecomputingReader(model, 1)

    def flops(step) -> int:  # type: ignore[no-untyped-def]
        with FlopCounterMode(display=False) as counter:
            step()
        return int(counter.get_total_flops())

    cached.read([0], [window])
    few = flops(lambda: cached.step([2], [1023]))
    many = flops(lambda: plain.read([0], [[*window, 2]]))
    print(f"cached {few:,}, recomputed {many:,}: {many / few:.0f} times")
    assert few > 2 * (model.config.n_params() - 1024 * 64) * 0.9, "less than one multiplication a weight"
    assert many > 300 * few


def test_the_benchmark_times_both_ways(text_model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio upside down, or one way timed twice; a context that the model does not have."""
    save_model(tmp_path / "model", text_model)
    context = text_model.config.block_size - 20
    options = [str(tmp_path / "model"), "--device", "cpu", "--tokens", "10", "--prompts", "2"]
    bench_sample.main([*options, "--context", str(context)])
    lines = capsys.readouterr().out.splitlines()
    cached, plain, ratio = (float(line.split()[-1]) for line in lines[1:])
    assert lines[0].startswith(f"2 prompts of {context} tokens")
    assert cached > 0 and ratio == pytest.approx(plain / cached, rel=0.05, abs=0.1)
    with pytest.raises(UserError, match=f"--context {context + 1} and 20 tokens"):
        bench_sample.main([*options, "--context", str(context + 1)])
    with pytest.raises(UserError, match="--prompts and --tokens are 1 or more"):
        bench_sample.main([*options, "--tokens", "0"])


def test_a_device_that_is_not_there_is_one_clear_line(text_model: GPT, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A traceback from inside torch, or an "auto" that leaves a GPU idle."""
    save_model(tmp_path / "model", text_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("cuda", "finds no GPU"), ("cuda:1", "finds no GPU"), ("gpu", "cannot be used: ")):
        with pytest.raises(UserError, match=f"--device {device}.*{message}") as caught:
            sample.main([str(tmp_path / "model"), "--device", device])
        assert "\n" not in str(caught.value)
    assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
