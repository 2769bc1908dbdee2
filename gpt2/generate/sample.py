"""Text from a trained model, for one prompt or several, streamed; reproducible by its seed.

    python -m gpt2.generate FOLDER --prompt "Once upon a time" [--tokens 200 --temperature 0.8 --top-k 50 --top-p 0.9]
    python -m gpt2.generate FOLDER --file prompts.txt      one prompt per line, continued in parallel
    python -m gpt2.generate FOLDER --interactive           continue each line of input
    python -m gpt2.generate FOLDER --chat                  the same, formatted as a conversation

FOLDER is a checkpoint, a Hugging Face folder, a llm.c file, or the directory of a finished stage with a model.
"""

from __future__ import annotations

import argparse
import codecs
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from gpt2.errors import UserError
from gpt2.generate.generation import Generation, SamplingParams
from gpt2.model.gpt import GPT
from gpt2.model.load import load_any, pick_device
from gpt2.tokenizer import EOT, gpt2_encoding


class IncrementalDetokenizer:
    """Converts tokens to text as they arrive: whole characters only, and no text that may begin a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = [text for text in stop if text]
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may split a character
        self._pending = ""

    def add(self, token: int) -> str:
        """The text that is complete with this token; may be empty."""
        if self.ended:
            return ""
        if token == EOT:
            self.ended = True
            return self.flush()
        return self._release(self._decoder.decode(gpt2_encoding().decode_single_token_bytes(token)))

    def flush(self) -> str:
        """The remaining text, after the last token."""
        text = self._release(self._decoder.decode(b"", final=True))
        pending, self._pending = self._pending, ""
        return text + pending

    def _release(self, new: str) -> str:
        text = self._pending + new
        stops = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        if stops:
            self.ended, self._pending = True, ""
            return text[: min(stops)]
        # the longest suffix of the text that is a prefix of a stop string
        keep = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def encode_prompt(text: str) -> list[int]:
    """Token ids of a prompt, which may contain <|endoftext|>. The empty prompt becomes <|endoftext|>, which precedes
    every document in the training data."""
    return gpt2_encoding().encode(text, allowed_special={"<|endoftext|>"}) or [EOT]


class StreamOptions(TypedDict, total=False):
    """Further options of `stream_batch` and `stream`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    cache: bool
    cuda_graph: bool


def stream_batch(
    model: GPT,
    prompts: Sequence[str],
    n_tokens: int,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
    **options: Unpack[StreamOptions],
) -> Iterator[tuple[int, str]]:
    """Continue several prompts in parallel; yields (index of the prompt, new text).

    Prompt i gets the same text as alone with seed + i, up to rounding. A text ends before <|endoftext|> or a stop
    string.
    """
    generation = Generation(
        model,
        [encode_prompt(prompt) for prompt in prompts],
        n_tokens,
        SamplingParams(options.get("temperature", 1.0), options.get("top_k"), options.get("top_p")),
        seeds=range(seed, seed + len(prompts)),
        stop=[EOT],
        cache=options.get("cache", True),
        cuda_graph=options.get("cuda_graph", False),
    )
    detokenizers = [IncrementalDetokenizer(stop) for _ in prompts]
    for tokens in generation:
        for row, token in enumerate(tokens):
            if token is None:
                continue
            if text := detokenizers[row].add(token):
                yield row, text
            generation.ended[row] = detokenizers[row].ended
    for row, detokenizer in enumerate(detokenizers):
        if not detokenizer.ended and (text := detokenizer.flush()):
            yield row, text


def stream(
    model: GPT,
    prompt: str,
    n_tokens: int,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
    **options: Unpack[StreamOptions],
) -> Iterator[str]:
    """Continue one prompt; yields new text, in whole characters. See `stream_batch`."""
    for _, text in stream_batch(model, [prompt], n_tokens, seed=seed, stop=stop, **options):
        yield text


def converse(
    lines: Iterator[str], write: Callable[[str], None], continue_: Callable[[str], Iterator[str]], *, chat: bool
) -> None:
    """For each line, append it to the text so far, then write and append the model's continuation.

    Args:
        continue_: text so far -> pieces of its continuation.
        chat: format the text as a conversation. A pretrained model imitates a conversation; it does not follow
            instructions.
    """
    text = ""
    for line in lines:
        text += f"{chr(10) if text else ''}You: {line}\nGPT-2:" if chat else line
        for piece in continue_(text):
            write(piece)
            text += piece
        text = text.rstrip("\n") if chat else text
        write("\n")


def _folder(recipe: str | None, words: list[str]) -> Path:
    if recipe is not None:
        from gpt2.runs import find  # not needed by a served model, which has no store

        return find(recipe, words)
    if len(words) != 1:
        raise UserError(f"expected one model folder, got {len(words)}: give its path, or --recipe NAME")
    return Path(words[0])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.generate", description="Text from a trained model.")
    parser.add_argument(
        "model",
        nargs="*",
        metavar="folder",
        help="checkpoint, Hugging Face folder or llm.c file; with --recipe: field=value ...",
    )
    parser.add_argument("--recipe", help="use the model trained by this recipe, with the given overrides")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help='text to continue; "" begins a document')
    prompt.add_argument("--file", type=Path, help="prompts, one per line")
    prompt.add_argument("--interactive", action="store_true", help="continue each line of input")
    prompt.add_argument("--chat", action="store_true", help="the same, formatted as a conversation")
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, help="restrict to the k most likely tokens")
    parser.add_argument(
        "--top-p", type=float, help="restrict to the most likely tokens that reach this cumulative probability"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--stop", action="append", default=[], help="end before this text; repeatable")
    parser.add_argument("--device", default="auto", help="auto (a GPU if present), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="run the model over the whole window for each token (slow; for comparison)",
    )
    args = parser.parse_intermixed_args(argv)

    model = load_any(_folder(args.recipe, args.model), pick_device(args.device))
    options: StreamOptions = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "cache": not args.no_cache,
        "cuda_graph": args.tokens > 32,
    }

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if args.interactive or args.chat:
        stop = [*args.stop, *(["\nYou:"] if args.chat else [])]
        seeds = itertools.count(args.seed)  # a new seed per turn, so that answers differ

        def continue_(text: str) -> Iterator[str]:
            return stream(model, text, args.tokens, seed=next(seeds), stop=stop, **options)

        converse(_input_lines(), write, continue_, chat=args.chat)
    elif args.file:
        try:
            prompts = args.file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(f"{args.file}: no such file; give a file with one prompt per line") from None
        texts = [""] * len(prompts)
        for row, piece in stream_batch(model, prompts, args.tokens, seed=args.seed, stop=args.stop, **options):
            texts[row] += piece
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            print(f"--- {row + 1}\n{prompt}{text}")
    else:
        write(args.prompt)
        for piece in stream(model, args.prompt, args.tokens, seed=args.seed, stop=args.stop, **options):
            write(piece)
        write("\n")


def _input_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
