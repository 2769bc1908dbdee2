"""Time per token with and without the key-value cache.

    python -m bench.sample FOLDER [--prompts 1] [--context 950] [--tokens 50]

Continues synthetic prompts of `--context` tokens and times the last `--tokens` of them, after a warm-up that includes
the CUDA graph's capture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt2.console import command
from gpt2.errors import UserError
from gpt2.generate.generation import Generation, SamplingParams
from gpt2.model.gpt import GPT
from gpt2.model.load import load_any, pick_device
from gpt2.tokenizer import EOT

WARM_UP = 10
"""untimed tokens"""


def seconds_per_token(model: GPT, prompts: int, context: int, tokens: int, *, cache: bool) -> float:
    """Mean seconds per step, which gives each of `prompts` prompts one token, over the last `tokens` steps.

    Raises:
        UserError: context and tokens do not fit into the model's block_size.
    """
    n_tokens = WARM_UP + tokens
    if min(prompts, tokens) < 1:
        raise UserError("--prompts and --tokens must be 1 or more")
    if not 0 < context <= model.config.block_size - n_tokens:
        raise UserError(
            f"--context {context} plus {n_tokens} tokens exceed the model's block_size {model.config.block_size:,}"
        )
    prompt = [EOT % model.config.vocab_size] + [11] * (context - 1)
    generation = Generation(
        model, [prompt] * prompts, n_tokens, SamplingParams(0.8), seeds=range(prompts), cache=cache, cuda_graph=True
    )
    times = [time.perf_counter() for _ in generation]  # token ids are on the host: the device has finished them
    return (times[-1] - times[-1 - tokens]) / tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Print milliseconds per token with and without the cache, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench.sample", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint, Hugging Face folder or llm.c file")
    parser.add_argument("--prompts", type=int, default=1, help="prompts in parallel (default 1)")
    parser.add_argument("--context", type=int, default=950, help="tokens per prompt (default 950)")
    parser.add_argument("--tokens", type=int, default=50, help="timed tokens (default 50)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if present), cpu, cuda, cuda:1, ...")
    arguments = parser.parse_args(argv)
    model = load_any(arguments.folder, pick_device(arguments.device))
    size = (arguments.prompts, arguments.context, arguments.tokens)
    cached, uncached = (seconds_per_token(model, *size, cache=cache) for cache in (True, False))
    print(f"{arguments.prompts} prompts of {arguments.context:,} tokens, ms per step of one token each")
    for name, figure in (("with the cache", 1e3 * cached), ("without", 1e3 * uncached), ("ratio", uncached / cached)):
        print(f"  {name:14} {figure:12.3f}")


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
