"""Configuration of a run: *what* is computed.

`RunConfig` is read from conf/<name>.yaml; each of its sections is hashed into the address of the stage it belongs to.
`gpt2.config.runtime.Runtime` describes the machine and is never hashed. The two trees share no section.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gpt2.config.benchmarks import BenchmarkConfig
from gpt2.config.section import ADDED, Count, LocalPath, Section
from gpt2.config.sources import CorpusSource, ModelSource
from gpt2.config.train import TrainConfig

ShardTokens = Annotated[int, Field(gt=0, lt=2**31, description="llm.c's header has 32 bits for it")]


# ------------------------------------------------------------------------------------------------------------- data


class DownloadConfig(Section):
    source: CorpusSource


class TokenizeConfig(Section):
    """How text becomes token shards. Defaults as in llm.c: shard 0 is for validation, 100M tokens per shard."""

    tokenizer: Literal["gpt2"] = "gpt2"
    prefix: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] = "fineweb"
    shard_tokens: ShardTokens = 100_000_000
    val_tokens: Annotated[ShardTokens | None, Field(description="tokens of shard 0; None: shard_tokens")] = None
    on_bad_input: Annotated[
        Literal["error", "skip"],
        Field(description="a row group that cannot be read, a null or non-string row: stop, or skip and list it"),
    ] = "error"
    max_document_bytes: Annotated[
        Count | None,
        ADDED,
        Field(description="of UTF-8 in a parquet row or a jsonl line; a longer one is bad input. txt is read in parts"),
    ] = None


# ----------------------------------------------------------------------------------------------- evaluation, report


class EvaluateConfig(Section):
    val_tokens: Count = 10_485_760
    benchmarks: Annotated[tuple[str, ...], Field(description="names under `benchmarks`")] = ()


class HarnessConfig(Section):
    """EleutherAI's lm-evaluation-harness on the finished model, for tasks that `benchmarks` lacks."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1, description="the harness's names, such as arc_easy")]
    data: Annotated[
        dict[str, LocalPath],
        Field(description="task -> local file (jsonl, parquet) of its examples, instead of the Hub"),
    ] = {}
    limit: Annotated[Count | None, Field(description="examples per task; None: all")] = None

    @model_validator(mode="after")
    def _data_is_for_tasks(self) -> HarnessConfig:
        for task in self.data:
            if task not in self.tasks:
                raise ValueError(f"data names {task!r}, but tasks has only {sorted(self.tasks)}")
        return self


class Published(Section):
    """Results published by others for this recipe, with their source; the report plots them with ours."""

    name: str
    source: str
    val_loss: float | None = None
    hellaswag_acc_norm: float | None = None
    core: Annotated[float | None, Field(description="DCLM's CORE as nanochat evaluates it")] = None
    hours: float | None = None
    dollars: float | None = None
    gpus: str | None = None
    note: Annotated[str | None, Field(description="limits of the comparison, e.g. other validation text")] = None


class ReportConfig(Section):
    title: str
    dollars_per_gpu_hour: Annotated[float, Field(ge=0.0, description="0 leaves the cost out")] = 0.0
    published: tuple[Published, ...] = ()


class RunConfig(Section):
    """One conf/<name>.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="of the recipe; names the MLflow run")]
    download: DownloadConfig
    tokenize: TokenizeConfig = TokenizeConfig()
    benchmarks: dict[str, BenchmarkConfig] = {}
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    harness: Annotated[HarnessConfig | None, Field(description="needs pip install 'reproduce-gpt2[harness]'")] = None
    baselines: Annotated[
        dict[str, ModelSource], Field(description="name -> published model to evaluate like ours")
    ] = {}
    report: ReportConfig

    @model_validator(mode="after")
    def _benchmarks_exist(self) -> RunConfig:
        references = [("train.benchmark", self.train.benchmark)] if self.train.benchmark else []
        references += [("evaluate.benchmarks", name) for name in self.evaluate.benchmarks]
        for field, name in references:
            if name not in self.benchmarks:
                raise ValueError(f"{field} names {name!r}, but benchmarks has only {sorted(self.benchmarks)}")
        return self
