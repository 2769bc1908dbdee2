"""Two runs on one chart of the MLflow page. Needs Chromium."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from waiting import free_port, wait_for

from flows.server_process import answers, start_server
from flows.services import mlflow_module
from gpt2.config.recipe import load
from gpt2.config.runtime import Runtime
from gpt2.plan import plan, prepare
from tasks.mlflow_sync import MlflowRunSync

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOY: dict[str, Any] = {
    "download.source": {"kind": "installed-docs"},
    "train.max_steps": 60,
    "train.optim.warmup_steps": 2,
    "train.benchmark": None,
    "evaluate.benchmarks": [],
}


def browse(url: str, *options: str) -> str:
    assert CHROMIUM
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    waiting = ["--window-size=1600,2400", "--virtual-time-budget=15000", "--timeout=30000"]
    done = subprocess.run([CHROMIUM, *quiet, *waiting, *options, url], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_two_sizes_stand_side_by_side(store: Path, fake_stages: Callable[..., None], tmp_path: Path) -> None:
    """Bug: nested runs, whose curves the chart view lacks."""
    runs: list[str | None] = []
    for recipe in ("124m", "350m"):
        config = load(recipe, TOY)
        steps = plan(config, store)
        for request in steps.requests().values():
            prepare(request, Runtime(store=store))
            subprocess.run([sys.executable, "-m", "fake_stages", str(store / request.address)], check=True)
        mlflow_run = MlflowRunSync(config, steps, store)
        mlflow_run.sync()
        runs.append(mlflow_run.run_id)
    port = free_port()
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = start_server(mlflow_module(store, port), variables, subprocess.DEVNULL, background=True)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        picture = tmp_path / "mlflow.png"
        base = f"http://127.0.0.1:{port}/#"
        overview = browse(f"{base}/experiments/1/runs?compareRunsMode=CHART", "--dump-dom")
        arguments = {"runs": runs, "metric": "train/loss", "experiments": ["1"], "plot_metric_keys": ["train/loss"]}
        query = "&".join(f"{key}={quote(json.dumps(value))}" for key, value in arguments.items())
        curves = browse(f"{base}/metric?{query}", "--dump-dom")
        browse(f"{base}/metric?{query}", f"--screenshot={picture}")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    shown = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", overview)).split())
    for text in ("124m ", "350m ", "train (3)", "val (1)"):
        assert text in shown, f"the overview does not show {text!r}: {shown[-2000:]}"
    for text in ("124m ", "350m ", "train/loss"):
        assert text in curves, f"the page of a metric does not show {text!r}"
    assert picture.stat().st_size > 30_000
