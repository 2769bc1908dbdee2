"""Tokenize on a Dask cluster that Prefect starts or connects to; input and output are fsspec URLs.

    tokenize_on_cluster(["s3://bucket/fineweb/000.parquet", ...], "s3://bucket/shards")

starts a cluster on this machine. To use a running cluster:

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
    """Write shards and facts.json under `output`, with the bytes of a single machine; see gpt2.tokenize.cluster.

    The units of work are Dask tasks, not Prefect tasks: thousands of those would cost more than the work.
    """
    context = FlowRunContext.get()
    assert context is not None and isinstance(context.task_runner, DaskTaskRunner)
    _ = context.task_runner.client  # starts or connects to the cluster; prefect-dask does so at the first submit only
    with get_dask_client() as client:
        return tokenize_to(client, inputs, output, config or TokenizeConfig(), column)
