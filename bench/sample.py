"""What one more token costs with the key-value cache, and without it.

    python -m bench.sample FOLDER [--prompts 1] [--context 950] [--tokens 50]

Both ways continue the same made-up prompts of `--context` tokens; timed are the last `--tokens` of some more, so that
what happens once (a CUDA graph's recording, first calls) is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2.console import command
from gpt2.errors import UserError
from gpt2.generate.generation import Choice, Generation
from gpt2.model.gpt import GPT
from gpt2.model.load import load_any, pick_device
from gpt2.tokenizer import EOT

WARM_UP = 10
"""tokens before the timed ones"""


def seconds_a_token(model: GPT, prompts: int, context: int, tokens: int, *, cache: bool) -> float:
    """Mean seconds for one more token of each of `prompts` prompts, over the last `tokens`.

    Raises:
        UserError: context and tokens do not fit into the model's block_size.
    """
    wanted = WARM_UP + tokens
    if min(prompts, tokens) < 1:
        raise UserError("--prompts and --tokens are 1 or more")
    if not 0 < context <= model.config.block_size - wanted:
        raise UserError(
            f"--context {context} and {wanted} tokens after it do not fit into the model's {model.config.block_size:,}"
        )
    prompt = [EOT % model.config.vocab_size] + [11] * (context - 1)
    generation = Generation(
        model, [prompt] * prompts, wanted, Choice(0.8), seeds=range(prompts), cache=cache, cuda_graph=True
    )
    marks = [time.perf_counter() for _ in generation]  # tokens come as numbers: the device is done with them
    return (marks[-1] - marks[-1 - tokens]) / tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Print milliseconds a token both ways, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench.sample", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder: ours, Hugging Face's, or a llm.c file")
    parser.add_argument("--prompts", type=int, default=1, help="continued side by side (default 1)")
    parser.add_argument("--context", type=int, default=950, help="tokens of each prompt (default 950)")
    parser.add_argument("--tokens", type=int, default=50, help="timed (default 50)")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    arguments = parser.parse_args(argv)
    model = load_any(arguments.folder, pick_device(arguments.device))
    size = (arguments.prompts, arguments.context, arguments.tokens)
    cached, plain = (seconds_a_token(model, *size, cache=cache) for cache in (True, False))
    print(f"{arguments.prompts} prompts of {arguments.context:,} tokens, ms for one more token of each")
    for name, figure in (("with the cache", 1e3 * cached), ("recomputed", 1e3 * plain), ("ratio", plain / cached)):
        print(f"  {name:14} {figure:12.3f}")


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
