"""Configuration of benchmarks; their readers are in gpt2/benchmark/."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gpt2.config.section import Count, Section, Seed
from gpt2.config.sources import HubFiles, LocalFiles

BenchmarkSource = Annotated[HubFiles | LocalFiles, Field(discriminator="kind")]
Limit = Annotated[Count | None, Field(description="number of examples, from the first; None: all")]
Prompt = Annotated[
    Literal["llm.c", "harness"],
    Field(description="llm.c: the unchanged text; harness: as lm-evaluation-harness prepares it"),
]


class Benchmark(Section):
    """Fields of every benchmark."""

    optional: Annotated[
        bool, Field(description="if its data is not available: omit and report it instead of failing")
    ] = False


class HellaSwag(Benchmark):
    kind: Literal["hellaswag"] = "hellaswag"
    source: BenchmarkSource
    limit: Limit = None
    prompt: Prompt = "llm.c"


class Continuation(Benchmark):
    """Multiple choice from held-out text: the true continuation of a passage against three from other documents.

    For machines without network. Chance is 0.25. Scores are comparable only on the same shards.
    """

    kind: Literal["continuation"] = "continuation"
    examples: Count = 500
    context_tokens: Count = 64
    ending_tokens: Count = 24
    seed: Seed = 42


class Lambada(Benchmark):
    """The last word of a passage (OpenAI's version of LAMBADA; column `text`)."""

    kind: Literal["lambada"] = "lambada"
    source: BenchmarkSource
    limit: Limit = None


class Arc(Benchmark):
    """AI2's science questions, easy or challenge by source; prompts as in lm-evaluation-harness."""

    kind: Literal["arc"] = "arc"
    source: BenchmarkSource
    limit: Limit = None


class Piqa(Benchmark):
    """Physical common sense, two solutions per goal; prompts as in lm-evaluation-harness."""

    kind: Literal["piqa"] = "piqa"
    source: BenchmarkSource
    limit: Limit = None


class WinoGrande(Benchmark):
    """Which of two names fills the blank, by the score of the text after it; as in lm-evaluation-harness."""

    kind: Literal["winogrande"] = "winogrande"
    source: BenchmarkSource
    limit: Limit = None


class WikiText103(Benchmark):
    """Perplexity per word of WikiText-103, de-tokenized as in GPT-2's paper (section 3.1)."""

    kind: Literal["wikitext103"] = "wikitext103"
    source: BenchmarkSource
    detokenize: Annotated[bool, Field(description="first undo WikiText's tokenization (spaces, @-@)")] = True
    stride: Annotated[
        Count | None, Field(description="tokens between windows; None: the context length, no overlap")
    ] = None


class Core(Benchmark):
    """DCLM's CORE: mean centered accuracy of 22 tasks, from nanochat's evaluation files (core.yaml, eval_meta_data.csv
    and the tasks' .jsonl)."""

    kind: Literal["core"] = "core"
    source: BenchmarkSource
    limit: Annotated[Count | None, Field(description="examples per task; None: all")] = None


BenchmarkConfig = Annotated[
    HellaSwag | Continuation | Lambada | Arc | Piqa | WinoGrande | WikiText103 | Core, Field(discriminator="kind")
]
