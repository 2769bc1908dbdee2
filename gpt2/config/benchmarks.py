"""Which benchmarks there are and what each is made from, as configuration.

Three forms of question hide behind them: multiple choice (`choice`), the last word (`last_word`) and perplexity. Only
pydantic here; the readers are in gpt2/benchmarks/.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gpt2.config.section import Count, Section, Seed
from gpt2.config.sources import HubFiles, LocalFiles

BenchmarkSource = Annotated[HubFiles | LocalFiles, Field(discriminator="kind")]
Limit = Annotated[Count | None, Field(description="only the first so many examples")]
Prompt = Annotated[
    Literal["llm.c", "harness"],
    Field(description="llm.c: the text as it is; harness: prepared as lm-evaluation-harness does"),
]


class Benchmark(Section):
    """What all have in common."""

    optional: Annotated[
        bool, Field(description="where its data cannot be had: leave it out and name it, instead of stopping the run")
    ] = False


class HellaSwag(Benchmark):
    kind: Literal["hellaswag"] = "hellaswag"
    source: BenchmarkSource
    limit: Limit = None
    prompt: Prompt = "llm.c"


class Continuation(Benchmark):
    """Multiple choice made from held-out text: the true continuation of a passage against three from other documents.

    For where no benchmark can be had. Chance is 0.25; comparable only with itself on the same shards.
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
    """AI2's science questions, easy or challenge as the source says; prompted as lm-evaluation-harness does."""

    kind: Literal["arc"] = "arc"
    source: BenchmarkSource
    limit: Limit = None


class Piqa(Benchmark):
    """Physical common sense, two solutions a goal; prompted as lm-evaluation-harness does."""

    kind: Literal["piqa"] = "piqa"
    source: BenchmarkSource
    limit: Limit = None


class WinoGrande(Benchmark):
    """Which of two names fills the blank: the text after the blank is scored, given each; as lm-evaluation-harness."""

    kind: Literal["winogrande"] = "winogrande"
    source: BenchmarkSource
    limit: Limit = None


class WikiText103(Benchmark):
    """Perplexity a word of WikiText-103, de-tokenized as in GPT-2's paper (section 3.1)."""

    kind: Literal["wikitext103"] = "wikitext103"
    source: BenchmarkSource
    detokenize: Annotated[bool, Field(description="undo WikiText's own tokenization (spaces, @-@) first")] = True
    stride: Annotated[
        Count | None, Field(description="tokens a window moves; None: the context length, no overlap")
    ] = None


class Core(Benchmark):
    """DCLM's CORE: the mean centered accuracy of 22 tasks, from the folder of files that nanochat evaluates with
    (core.yaml, eval_meta_data.csv and the tasks' .jsonl files)."""

    kind: Literal["core"] = "core"
    source: BenchmarkSource
    limit: Annotated[Count | None, Field(description="of each task, only so many examples")] = None


BenchmarkConfig = Annotated[
    HellaSwag | Continuation | Lambada | Arc | Piqa | WinoGrande | WikiText103 | Core, Field(discriminator="kind")
]
