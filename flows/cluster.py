"""Tokenization on a Dask cluster that Prefect starts or joins, from any addresses to any address.

    tokenize_on_cluster(["s3://bucket/fineweb/000.parquet", ...], "s3://bucket/shards")

starts a cluster on this machine; for one that runs, or that Dask can start elsewhere:

    tokenize_on_cluster.with_options(task_runner=DaskTaskRunner(address="tcp://scheduler:8786"))(...)
"""

from __future__ import annotations

from prefect import flow
from prefect.context import FlowRunContext
from prefect_dask import DaskTaskRunner, get_dask_client

from gpt2.config.run import TokenizeConfig
from gpt2.stage.facts import TokenizeFacts
from gpt2.tokenize.cluster import tokenize_to


@flow(name="tokenize-on-cluster", task_runner=DaskTaskRunner())  # type: ignore[arg-type]
def tokenize_on_cluster(
    inputs: list[str], output: str, config: TokenizeConfig | None = None, column: str = "text"
) -> TokenizeFacts:
    """Shards and facts.json under `output`, the bytes of a single machine; see gpt2.tokenize.cluster.

    The units are the cluster's tasks, thousands of them, and none of Prefect's: those would cost more than the work.
    """
    context = FlowRunContext.get()
    assert context is not None and isinstance(context.task_runner, DaskTaskRunner)
    _ = context.task_runner.client  # starts or joins the cluster: prefect-dask leaves it until a task is submitted
    with get_dask_client() as client:
        return tokenize_to(client, inputs, output, config or TokenizeConfig(), column)
