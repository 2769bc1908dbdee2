"""Text from a trained model: one prompt or many, streamed or whole, the same for the same seed.

    python -m gpt2.generate FOLDER --prompt "Once upon a time" [--tokens 200 --temperature 0.8 --top-k 50 --top-p 0.9]
    python -m gpt2.generate FOLDER --file prompts.txt      one prompt a line, continued side by side
    python -m gpt2.generate FOLDER --interactive           continue what is typed
    python -m gpt2.generate FOLDER --chat                  the same, laid out as a conversation

FOLDER is a checkpoint of ours, a Hugging Face folder, a llm.c file, or the directory of a finished stage with a model.
"""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpt2.errors import UserError
from gpt2.generate.generation import Choice, Generation, generate
from gpt2.model.gpt import GPT
from gpt2.model.load import load_any, pick_device
from gpt2.tokenizer import EOT, gpt2_encoding

__all__ = ["TextPieces", "encode_prompt", "generate", "stream", "stream_batch"]


class TextPieces:
    """From tokens to text that may be shown: whole characters only, and nothing that may turn out to be the beginning
    of a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = [text for text in stop if text]
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
        self._held = ""

    def add(self, token: int) -> str:
        """The text that this token makes certain; "" while there is none."""
        if self.ended:
            return ""
        if token == EOT:
            self.ended = True
            return self.rest()
        return self._release(self._decoder.decode(gpt2_encoding().decode_single_token_bytes(token)))

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        # the longest end of the text that begins a stop string
        keep = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def encode_prompt(text: str) -> list[int]:
    """Token ids of a prompt; a text of its own begins after <|endoftext|>, so that stands for the empty prompt, and it
    may be written out in the text."""
    return gpt2_encoding().encode(text, allowed_special={"<|endoftext|>"}) or [EOT]


def stream_batch(
    model: GPT,
    prompts: Sequence[str],
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    cache: bool = True,
    cuda_graph: bool = False,
) -> Iterator[tuple[int, str]]:
    """Continue several prompts at once; (index of the prompt, piece of text) as they come.

    Prompt i gets what it would get alone with seed + i, to rounding. A text ends at <|endoftext|>, which is not shown,
    or before a stop string.
    """
    generation = Generation(
        model,
        [encode_prompt(prompt) for prompt in prompts],
        n_tokens,
        Choice(temperature, top_k, top_p),
        seeds=[seed + i for i in range(len(prompts))],
        stop=[EOT],
        cache=cache,
        cuda_graph=cuda_graph,
    )
    pieces = [TextPieces(stop) for _ in prompts]
    for tokens in generation:
        for row, token in enumerate(tokens):
            if token is None:
                continue
            if text := pieces[row].add(token):
                yield row, text
            generation.ended[row] = pieces[row].ended
    for row, piece in enumerate(pieces):
        if not piece.ended and (text := piece.rest()):
            yield row, text


def stream(
    model: GPT,
    prompt: str,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    cache: bool = True,
    cuda_graph: bool = False,
) -> Iterator[str]:
    """Continue one prompt; pieces of text as they come, each of whole characters. See `stream_batch`."""
    batch = stream_batch(
        model,
        [prompt],
        n_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        cache=cache,
        cuda_graph=cuda_graph,
    )
    for _, text in batch:
        yield text


def converse(
    lines: Iterator[str], write: Callable[[str], None], continue_: Callable[[str], Iterator[str]], *, chat: bool
) -> None:
    """Read a line, write how the model continues everything said so far, again and again.

    Args:
        continue_: text so far -> pieces of its continuation.
        chat: lay the text out as a conversation. A model that was only pretrained answers as the text of some
            conversation might go on; it was never taught to follow instructions.
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
        from gpt2.runs import find  # a served model has no store

        return find(recipe, words)
    if len(words) != 1:
        raise UserError(f"one model is needed, {len(words)} are given: name its folder, or --recipe NAME")
    return Path(words[0])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.generate", description="Text from a trained model.")
    parser.add_argument(
        "model",
        nargs="*",
        metavar="folder",
        help="ours, Hugging Face's, or a llm.c file; with --recipe: field=value ...",
    )
    parser.add_argument("--recipe", help="the model that this recipe trained, with the overrides given")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help='text to continue; "" begins a document')
    what.add_argument("--file", type=Path, help="prompts, one a line")
    what.add_argument("--interactive", action="store_true", help="continue what is typed")
    what.add_argument("--chat", action="store_true", help="the same, laid out as a conversation")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many new tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default 0.8)")
    parser.add_argument("--top-k", type=int, help="only the so many likeliest tokens")
    parser.add_argument("--top-p", type=float, help="only the likeliest tokens that reach this probability together")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--no-cache", action="store_true", help="recompute everything for each token; for comparison")
    args = parser.parse_intermixed_args(argv)

    model = load_any(_folder(args.recipe, args.model), pick_device(args.device))
    options = {
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
        turn = iter(range(args.seed, sys.maxsize))  # each turn its own seed, or every answer would repeat the dice

        def continue_(text: str) -> Iterator[str]:
            return stream(model, text, args.tokens, seed=next(turn), stop=stop, **options)

        converse(_typed(), write, continue_, chat=args.chat)
    elif args.file:
        try:
            prompts = args.file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(f"{args.file}: no such file; give one with a prompt on each line") from None
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


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
