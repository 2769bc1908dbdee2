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
from gpt2.generate import cuda_graph, sample
from gpt2.generate.cuda_graph import CudaGraphSampler
from gpt2.generate.generation import Generation, SamplingParams, UncachedDecoder, generate
from gpt2.generate.sample import IncrementalDetokenizer, converse, encode_prompt, stream, stream_batch
from gpt2.model.checkpoint import save_model
from gpt2.model.gpt import GPT
from gpt2.model.kv_cache import CachedDecoder
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


def test_cached_logits_differ_from_uncached_ones(model: GPT) -> None:
    """A position, mask or cache slot is off by one."""
    tokens = random.Random(7).choices(range(211), k=32)
    for first in (1, 9, 31):
        cached, plain = CachedDecoder(model, 1, 32), UncachedDecoder(model, 1)
        torch.testing.assert_close(cached.prefill([0], [tokens[:first]]), plain.prefill([0], [tokens[:first]]))
        for position in range(first, 32):
            ours = cached.decode([tokens[position]], [position])
            torch.testing.assert_close(ours, plain.decode([tokens[position]], [position]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(top_k=20, top_p=0.5),
    ],
    ids=str,
)
def test_cache_changes_the_text_past_the_window(model: GPT, sampling: SamplingParams) -> None:
    """The window slides differently, or keys of moved positions stay cached."""
    for length in (1, 31, 32, 33, 70):
        prompt = list(range(length))
        texts = [list(Generation(model, [prompt], 80, sampling, seeds=[3], cache=cache)) for cache in (True, False)]
        assert texts[0] == texts[1], f"prompt of {length}"


def test_batching_changes_a_prompts_text(model: GPT) -> None:
    """Rows of different lengths see each other's padding, or share random draws."""
    prompts = [[1], [2, 3, 4, 5], list(range(30)), list(range(40)), [1]]
    batch = list(Generation(model, prompts, 90, SamplingParams(), seeds=range(5, 10), stop=[7, 8, 9, 10]))
    alone = [generate(model, prompt, 90, seed=5 + i, stop=[7, 8, 9, 10]) for i, prompt in enumerate(prompts)]
    assert [[step[row] for step in batch if step[row] is not None] for row in range(5)] == alone
    assert alone[0] != alone[4], "same prompt, other seed"
    assert any(len(text) < 90 for text in alone), "no text reached a stop token: choose others"
    for text in alone:
        assert len(text) == 90 or text[-1] in (7, 8, 9, 10)
        assert not {7, 8, 9, 10} & set(text[:-1])


def test_sampling_changes_the_global_random_state_or_the_weights(model: GPT) -> None:
    """Sampling during training changes the rest of the training."""
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    first = generate(model, [1, 2, 3], 40, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    torch.rand(5)
    assert generate(model, [1, 2, 3], 40, seed=11) == first
    assert generate(model, [1, 2, 3], 40, seed=12) != first


def test_samples_follow_another_distribution() -> None:
    """A shifted cumulative sum: each token is replaced by its neighbour."""
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()
    n = 20_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = SamplingParams().sample_token(logits.expand(n, 4), u).bincount(minlength=4) / n
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.1, 0.25, 0.15]), atol=0.012, rtol=0)
    # the nucleus of 0.7 is the two likeliest, 2/3 to 1/3; so are the top two
    for sampling in (SamplingParams(top_p=0.7), SamplingParams(top_k=2)):
        drawn = sampling.sample_token(logits.expand(n, 4), u).bincount(minlength=4) / n
        torch.testing.assert_close(drawn, torch.tensor([2 / 3, 0, 1 / 3, 0]), atol=0.012, rtol=0)


def test_limits_without_effect_change_the_text() -> None:
    """top_p 1 as a number, as in MLflow's parameters, gives another text for the same seed."""
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    u = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sampling in (SamplingParams(top_p=1.0), SamplingParams(top_k=20), SamplingParams(top_k=99, top_p=1.0)):
        assert torch.equal(sampling.sample_token(logits, u), SamplingParams().sample_token(logits, u))


def test_extreme_uniforms_sample_impossible_tokens() -> None:
    """u = 0 or nearly 1 samples a token of probability 0, or past the end."""
    logits = torch.tensor([[-float("inf"), 1.0, 2.0, -float("inf")]])
    for u in (0.0, 1 - 2**-53):
        for sampling in (
            SamplingParams(),
            SamplingParams(top_k=3),
            SamplingParams(top_p=1.0),
            SamplingParams(top_p=1e-9),
            SamplingParams(temperature=1e-3),
        ):
            assert sampling.sample_token(logits, torch.tensor([u], dtype=torch.float64)).item() in (1, 2), (u, sampling)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}])
def test_sampling_params_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"temperature|top_k|top_p"):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_invalid_prompts_are_an_index_error(model: GPT) -> None:
    with pytest.raises(UserError, match="without tokens"):
        generate(model, [], 3)
    with pytest.raises(UserError, match=r"token 211, .* 210"):
        generate(model, [1, 211], 3)
    assert generate(model, [1], 0) == []


# ---------------------------------------------------------------------------------------------------------- as text


def test_streamed_pieces_split_characters() -> None:
    """Half a character becomes replacement characters: GPT-2's tokens split emoji and Chinese characters."""
    text = "naïve 🤖 東京 — ok"
    pieces = IncrementalDetokenizer()
    shown = [pieces.add(token) for token in gpt2_encoding().encode_ordinary(text)]
    assert "".join(shown) + pieces.flush() == text
    assert not any("\ufffd" in piece for piece in shown)
    cut = IncrementalDetokenizer()
    assert cut.add(gpt2_encoding().encode_ordinary("🤖")[0]) == ""
    assert cut.flush() == "\ufffd"


def test_part_of_a_stop_string_is_streamed() -> None:
    """The first half of a stop string is streamed before the second half arrives."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        text = "".join(rng.choices("ab\n", k=30))
        stops = ["".join(rng.choices("ab\n", k=rng.randint(1, 5))) for _ in range(2)]
        end = next((n for n in range(31) if any(stop in text[:n] for stop in stops)), 30)  # the first to be complete
        expected = text[: min((index for index in (text[:end].find(stop) for stop in stops) if index >= 0), default=30)]
        pieces = IncrementalDetokenizer(stops)
        shown = ""
        for character in text:
            shown += pieces.add(gpt2_encoding().encode_single_token(character))
            assert expected.startswith(shown)
        assert shown + ("" if pieces.ended else pieces.flush()) == expected, (text, stops)


def test_text_continues_past_endoftext() -> None:
    pieces = IncrementalDetokenizer(["zebra"])
    shown = [pieces.add(token) for token in [*gpt2_encoding().encode_ordinary("a ze"), EOT, 64]]
    assert "".join(shown) == "a ze", "the text withheld for a stop string is lost"
    assert pieces.ended


def test_streamed_text_differs_from_the_ids(text_model: GPT) -> None:
    ids = generate(text_model, encode_prompt("Hello"), 40, seed=5, top_k=50, stop=[EOT])
    text = gpt2_encoding().decode([token for token in ids if token != EOT])
    assert "".join(stream(text_model, "Hello", 40, seed=5, top_k=50)) == text
    rows = ["", ""]
    for row, piece in stream_batch(text_model, ["", "Hello"], 40, seed=4, top_k=50):
        rows[row] += piece
    assert rows[1] == text, "prompt i of a batch is alone with seed + i"
    stop = text[10:13]
    assert "".join(stream(text_model, "Hello", 40, seed=5, top_k=50, stop=[stop])) == text[: text.index(stop)]


def test_empty_prompt_has_no_tokens() -> None:
    assert encode_prompt("") == [EOT]
    assert encode_prompt("<|endoftext|>Hi") == [EOT, *gpt2_encoding().encode_ordinary("Hi")]


def test_conversation_forgets_earlier_turns() -> None:
    prompts: list[str] = []

    def answer(text: str):  # type: ignore[no-untyped-def]
        prompts.append(text)
        yield " fine"

    written: list[str] = []
    converse(iter(["How are you?", "And now?"]), written.append, answer, chat=True)
    assert prompts[1] == "You: How are you?\nGPT-2: fine\nYou: And now?\nGPT-2:"
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
    """A CUDA graph without a GPU: replay runs the step again."""

    def __init__(self, sampler: CudaGraphSampler) -> None:
        self.sampler = sampler

    def replay(self) -> None:
        self.sampler._tokens.copy_(self.sampler._step())


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[Generation], Generation]:
    """Makes a generation on a CPU sample through CudaGraphSampler."""

    class Nothing:
        def __init__(self, *_: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    for name in ("Stream", "Event", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)

    def captured(generation: Generation) -> Generation:
        assert isinstance(generation.decoder, CachedDecoder)
        sampler = generation.graph_sampler = CudaGraphSampler(
            generation.decoder, generation.sampling.sample_token, generation.uniforms
        )
        sampler._graph = Replay(sampler)  # type: ignore[assignment]
        return generation

    return captured


def test_steps_launched_ahead_change_the_text(capture: Callable[[Generation], Generation]) -> None:
    """A step launched ahead gets another token, or continues past the end of a window; rows that end, by a stop token
    or by `ended`, or become full at different times."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(40):
        block_size, rows, n_tokens = rng.choice([2, 3, 5, 16]), rng.randint(1, 6), rng.randint(1, 12)
        model = small_model(block_size=block_size)
        prompts = [[rng.randrange(211) for _ in range(rng.randint(1, block_size + 4))] for _ in range(rows)]
        sampling = rng.choice(
            [SamplingParams(), SamplingParams(temperature=0), SamplingParams(0.7, top_k=5), SamplingParams(top_p=0.9)]
        )
        stop = rng.sample(range(211), rng.choice([0, 40]))
        ends = {rng.randint(1, n_tokens): rng.randrange(rows) for _ in range(rng.choice([0, 2]))}

        def text(captured: bool) -> list[list[int | None]]:
            generation = Generation(model, prompts, n_tokens, sampling, seeds=range(rows), stop=stop)  # noqa: B023
            steps = []
            for tokens in capture(generation) if captured else generation:
                steps.append(tokens)
                if len(steps) in ends:  # noqa: B023
                    generation.ended[ends[len(steps)]] = True  # noqa: B023
            return steps

        assert text(True) == text(False), (block_size, prompts, sampling, stop, ends)


def test_memory_of_a_cuda_graph_is_freed(
    capture: Callable[[Generation], Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph stores addresses, not tensors: buffers without references are reused for other tensors."""

    class FakeFusedDecoder:
        def __init__(self, decoder: CachedDecoder) -> None:
            self.decoder = decoder
            fused.append(weakref.ref(self))

        def decode(self, idx: Tensor, positions: Tensor) -> Tensor:
            return self.decoder.masked_decode(idx.view(-1, 1), positions, self.decoder.capacity)

    fused: list[weakref.ref[FakeFusedDecoder]] = []
    monkeypatch.setattr(cuda_graph, "is_supported", lambda decoder: True)
    monkeypatch.setattr(cuda_graph, "FusedDecoder", FakeFusedDecoder)
    generation = capture(Generation(small_model(), [[1], [2]], 5, SamplingParams(), seeds=[1, 2]))
    decoder = weakref.ref(generation.decoder)
    del generation.decoder
    gc.collect()
    assert fused[0]() is not None and decoder() is not None


def test_generation_is_iterated_twice() -> None:
    """The second iteration repeats tokens, or writes past the end of the cache."""
    generation = Generation(small_model(), [[1]], 3, SamplingParams(), seeds=[1])
    assert len(list(generation)) == 3
    with pytest.raises(RuntimeError, match="once"):
        list(generation)
    for nothing in (0, -1, -5):
        assert list(Generation(small_model(), [[1]], nothing, SamplingParams(), seeds=[1], cuda_graph=True)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(0.7, top_k=50), SamplingParams(top_p=0.9), SamplingParams(temperature=0)],
)
@pytest.mark.parametrize("more", [0, 2])  # 3 rows use Triton kernels, 5 use torch's
def test_cuda_graph_text_differs_from_eager_and_uncached(sampling: SamplingParams, more: int) -> None:
    """A CUDA graph reads the tokens of its capture, or writes to the buffers of another one; batched products mask the
    wrong positions."""
    model = small_model(block_size=64).cuda()
    prompts = [[5] * 3, [7] * 20, [9] * 63, *[[2] * 10] * more]  # the third window is full at once, the others later

    def start(**how: bool) -> Generation:
        return Generation(model, prompts, 150, sampling, seeds=range(5, 8 + more), **how)

    def sample_texts(*generations: Generation) -> list[list[list[int | None]]]:
        texts: list[list[list[int | None]]] = [[] for _ in generations]
        for step in zip(*generations, strict=True):  # interleaved, so that they could disturb each other
            for text, tokens, generation in zip(texts, step, generations, strict=True):
                text.append(tokens)
                generation.ended[1] |= len(text) == 20
        return texts

    one, two = sample_texts(start(cuda_graph=True), start(cuda_graph=True))
    assert one == two == sample_texts(start())[0] == sample_texts(start(cache=False))[0]
    assert len(one) == 150 and [row[1] is None for row in one] == [False] * 20 + [True] * 130


def test_cached_token_costs_a_whole_window() -> None:
    """The cache does not save work. Counts FLOPs: times also depend on the machine's speed at long and short
    products."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=1024, vocab_size=500))
    model.init_weights(seed=1)
    window = [1] * 1023
    cached, plain = CachedDecoder(model, 1, 1024), UncachedDecoder(model, 1)

    def flops(step) -> int:  # type: ignore[no-untyped-def]
        with FlopCounterMode(display=False) as counter:
            step()
        return int(counter.get_total_flops())

    cached.prefill([0], [window])
    cached_flops = flops(lambda: cached.decode([2], [1023]))
    plain_flops = flops(lambda: plain.prefill([0], [[*window, 2]]))
    print(f"cached {cached_flops:,}, uncached {plain_flops:,}")
    assert cached_flops > 2 * (model.config.n_params() - 1024 * 64) * 0.9, "less than one multiplication a weight"
    assert plain_flops > 300 * cached_flops


def test_benchmark_times_the_cache_twice_or_inverts_the_ratio(
    text_model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: a context longer than block_size."""
    save_model(tmp_path / "model", text_model)
    context = text_model.config.block_size - 20
    options = [str(tmp_path / "model"), "--device", "cpu", "--tokens", "10", "--prompts", "2"]
    bench_sample.main([*options, "--context", str(context)])
    lines = capsys.readouterr().out.splitlines()
    cached, plain, ratio = (float(line.split()[-1]) for line in lines[1:])
    assert lines[0].startswith(f"2 prompts of {context} tokens")
    assert cached > 0 and ratio == pytest.approx(plain / cached, rel=0.05, abs=0.1)
    with pytest.raises(UserError, match=rf"--context {context + 1} .* 20 tokens"):
        bench_sample.main([*options, "--context", str(context + 1)])
    with pytest.raises(UserError, match=r"--prompts and --tokens .* 1"):
        bench_sample.main([*options, "--tokens", "0"])


def test_missing_device_is_a_traceback(text_model: GPT, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Also: "auto" leaves a GPU idle."""
    save_model(tmp_path / "model", text_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("cuda", "GPU"), ("cuda:1", "GPU"), ("gpu", "gpu")):
        with pytest.raises(UserError, match=f"--device {device}.*{message}") as caught:
            sample.main([str(tmp_path / "model"), "--device", device])
        assert "\n" not in str(caught.value)
    assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
