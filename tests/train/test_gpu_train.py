"""Training on a GPU: killed and resumed it ends with the same bits, by the fused kernels, compiled or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import assert_same, faulty, make_run, make_shards, result, run

from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TrainFacts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHAPE: dict[str, Any] = {
    "model": {"n_layer": 3, "n_head": 12, "n_embd": 768, "block_size": 256},
    "total_batch_size": 4096,  # 16 sequences in 4 micro-steps
    "optim": {"max_lr": 1e-3, "warmup_steps": 2},
    "max_steps": 9,
    "val": {"every": 4, "tokens": 512},
}
PATHS: dict[str, dict[str, Any]] = {
    "fused kernels": {},
    "head in 8 bits": {},
    "compiled": {"kernels": "reference", "compile": True},
    "eager": {"kernels": "reference", "compile": False},
    "eager fp32": {"kernels": "reference", "compile": False, "precision": "fp32"},
}


@pytest.mark.parametrize("path", PATHS)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, path: str) -> None:
    """Bugs: atomic additions, kernels chosen by how fast they were this time, a weight copy that is not renewed after
    a resume."""
    runtime = {"gpus": "auto", "micro_batch_size": 4, "deterministic": True, **PATHS[path]}
    in_8_bits = path == "head in 8 bits"
    shards = make_shards(tmp_path / "whole", 200_000, eot=True)
    whole = make_run(tmp_path / "whole", shards, runtime, **SHAPE, fp8_head=in_8_bits)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    killed = tmp_path / "killed" / whole.relative_to(tmp_path / "whole")
    print(run(whole, gpu=True, timeout=300))
    to_be_had = torch.cuda.get_device_capability() >= (8, 9)
    assert StageDir(whole).facts(TrainFacts).fp8_head == (in_8_bits and to_be_had)
    run(killed, gpu=True, expect=-9, words=faulty(killed, 1, "SIGKILL", "step", 0, step=6))
    assert "resuming after step 4 of 9" in run(killed, gpu=True)
    assert_same(result(killed), result(whole))
