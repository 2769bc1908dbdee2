"""Several processes: the same training as one, on any number of them, and an end when one of them dies or hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from tiny_run import assert_same, faulty, make_run, make_shards, result, run, set_runtime, start, steps
from torch import nn

from bench.loss_check import TrainRun, zipf_tokens
from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig, OptimConfig, TrainConfig
from gpt2.distributed import SINGLE_PROCESS, World
from gpt2.train.parallel import partition_parameters

pytestmark = pytest.mark.slow


def copy_of(directory: Path, name: str) -> Path:
    """A run of the same stage in a store of its own."""
    store = directory.parent.parent
    target = store.parent / name
    shutil.copytree(store, target)
    return target / directory.relative_to(store)


def assert_close(a: dict[str, Any], b: dict[str, Any], tolerance: float = 2e-4) -> None:
    """Equal within rounding: every loss, and the weights that came of them."""
    for one, other in zip(a["metrics"], b["metrics"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"unit"}:
            assert one[name] == pytest.approx(other[name], rel=tolerance), (one["step"], name)
    for name, tensor in a["weights"].items():
        torch.testing.assert_close(tensor, b["weights"][name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process; `fresh` beside it has not been started."""
    store = tmp_path_factory.mktemp("runs") / "alone"
    directory = make_run(store, make_shards(store))
    copy_of(directory, "fresh")
    run(directory)
    return directory


def fresh_run(alone: Path, name: str) -> Path:
    store = alone.parent.parent
    return copy_of(store.parent / "fresh" / alone.relative_to(store), name)


def test_elastic_2_to_1_to_3_and_every_sharding(alone: Path) -> None:
    """Bugs: another order of data, another weighting of uneven shares, moments that only fit the number of processes
    they were saved by. FSDP over 2 processes, then one with other micro-batches, then ZeRO-1 over 3."""
    directory = fresh_run(alone, "elastic")
    set_runtime(directory, sharding="fsdp", micro_batch_size=2)
    run(directory, expect=None, words=faulty(directory, 2, "SIGTERM", "step", 0, step=3))
    first = steps(directory)[-1]
    set_runtime(directory, sharding="auto", micro_batch_size=5)  # 12 sequences in parts of 4
    run(directory, expect=143, words=faulty(directory, 1, "SIGTERM", "step", 0, step=7))
    second = steps(directory)[-1]
    assert 3 < first < 8 <= second < 12
    set_runtime(directory, sharding="zero1", micro_batch_size=3)  # 4 sequences each, in parts of 2
    run(directory, 3)
    assert_close(result(directory), result(alone))


def test_five_processes_share_twelve_sequences(alone: Path) -> None:
    """Bug: refusing, or weighting wrongly, a number of processes that does not divide the batch."""
    directory = fresh_run(alone, "uneven")
    assert "12 sequences per step are not divisible by 5 x 1" in run_with(directory, 5, micro_batch_size=1)
    assert_close(result(directory), result(alone))


def run_with(directory: Path, processes: int, **runtime: Any) -> str:
    set_runtime(directory, **runtime)
    return run(directory, processes)


def test_zero1_and_ddp_are_the_same_to_the_bit(alone: Path) -> None:
    """Bug: a parameter whose owner does not update it, or whose update does not reach the others."""
    ddp, zero1 = fresh_run(alone, "ddp"), fresh_run(alone, "zero1")
    run_with(ddp, 2)
    run_with(zero1, 2, sharding="zero1")
    assert_same(result(ddp), result(zero1))


def test_two_nodes_are_two_processes(alone: Path) -> None:
    """Bugs: a global rank where the local one is meant, or the other way round; a lost node that the others wait for.
    Two torchrun agents meet at a c10d rendezvous, as deploy/ starts them on a cluster."""
    ddp, nodes = fresh_run(alone, "one-node"), fresh_run(alone, "two-nodes")
    run(ddp, 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def agents(words: list[str]) -> list[Any]:
        common = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *common, "--rdzv-id=test"]
        return [start(nodes, words=[*torchrun, *words]) for _ in range(2)]

    lost = agents([*faulty(nodes, 1, "SIGKILL", "step", 1)[1:]])
    for agent in lost:
        output, _ = agent.communicate(timeout=100)
        assert agent.returncode != 0, output
    assert steps(nodes) in ([4], [])  # the thread may still have been writing it
    for agent in agents(["-m", "gpt2.train", str(nodes)]):
        output, _ = agent.communicate(timeout=100)
        assert agent.returncode == 0, output
    assert_same(result(nodes), result(ddp))


def test_the_rank_that_failed_is_heard_first(alone: Path) -> None:
    """Bug: the traceback of the cause buried under those of its victims."""
    directory = fresh_run(alone, "traceback")
    output = run(directory, expect=1, words=faulty(directory, 2, "exception", "step", 1))
    own, _, _ = output.partition("torch/distributed/elastic")
    assert own.count("Traceback") == 1, output
    assert "[rank 1] RuntimeError: a fault of this test" in own


def test_a_hang_is_reported_and_ends(alone: Path) -> None:
    """Bug: a stopped process that holds the others, and their GPUs, until somebody looks."""
    directory = fresh_run(alone, "hang")
    process = start(directory, words=faulty(directory, 2, "hang", "step", 1, step=9))
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "rank 0: a step is taking" in output, output
    assert '"kind": "slow step"' in (directory / "anomalies.jsonl").read_text()
    run(directory, 2)


def test_a_kill_of_torchrun_ends_all(alone: Path) -> None:
    """Bug: SIGTERM to the launcher ends ranks before they saved."""
    directory = fresh_run(alone, "launcher")
    process = start(directory, 2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            os.kill(process.pid, signal.SIGTERM)
            break
    rest = process.stdout.read()
    process.wait(60)
    assert steps(directory)[-1] >= 5 and "everything is saved" in rest, rest


def test_owners_share_alike() -> None:
    """Bug: all large tensors with one process."""
    parameters = [nn.Parameter(torch.empty(n)) for n in (100, 40, 40, 30, 30, 30, 30, 1)]
    owner = partition_parameters(parameters, 3)
    loads = [sum(p.numel() for p, o in zip(parameters, owner, strict=True) if o == rank) for rank in range(3)]
    assert sorted(loads) == [100, 100, 101]


def test_a_world_of_one_needs_nobody() -> None:
    """Bug: a collective that waits for a group that was never made."""
    assert SINGLE_PROCESS.sum(1.5, 2) == [1.5, 2.0]
    assert SINGLE_PROCESS.all_gather(3.0) == [3.0]
    assert SINGLE_PROCESS.broadcast_json({"a": [1, None]}) == {"a": [1, None]}
    assert not SINGLE_PROCESS.is_published("failed") and SINGLE_PROCESS.publish_first("failed")
    assert World(0, 0, 1, torch.device("cpu")) == SINGLE_PROCESS


CONFIG = TrainConfig(
    model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=300),
    optim=OptimConfig(max_lr=1e-2, warmup_steps=1),
    total_batch_size=192,
    max_steps=4,
)


def losses_of_the_bench(world: World, sharding: str) -> list[float]:
    train_run = TrainRun(CONFIG, Runtime(gpus=0, micro_batch_size=4, sharding=sharding), world)  # type: ignore[arg-type]
    batch = zipf_tokens(CONFIG.model, CONFIG.sequences_per_step, world.device)
    return [train_run.step(step, batch) for step in range(4)]


@pytest.mark.parametrize(("size", "sharding"), [(2, "ddp"), (3, "zero1")])
def test_the_bench_times_the_same_training_on_several(size: int, sharding: str) -> None:
    """Bug: the speed of processes that each train on the whole batch, or apart."""
    alone = losses_of_the_bench(SINGLE_PROCESS, "ddp")
    assert alone[-1] < alone[0] - 0.05
    for losses in run_processes(size, losses_of_the_bench, sharding):
        assert losses == pytest.approx(alone, rel=1e-5)


def test_the_bench_under_torchrun(tmp_path: Path) -> None:
    """Bugs: every process speaks, no figure for what the sums cost, an efficiency beside another number of tokens."""
    words = ["-m", "bench.train", "--size=demo", "--total-batch-size=4096", "--micro-batch-size=8", "--steps=2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    alone = [sys.executable, *words, f"--json={one}"]
    done = subprocess.run(alone, env=environment, check=True, timeout=120, stderr=subprocess.PIPE, text=True)
    assert done.stderr.count("no GPU") == 1
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    output = subprocess.run(
        [*several, f"--beside={one}", f"--json={two}"], env=environment, check=True, timeout=120, capture_output=True
    ).stdout.decode()
    figures = json.loads(two.read_text())
    efficiency = 50 * figures["tokens/s"] / json.loads(one.read_text())["tokens/s"]
    assert figures["scaling efficiency %"] == pytest.approx(efficiency)
    assert output.count("tokens/s") == 1 and "ms of gradient all-reduce not overlapped" in figures
