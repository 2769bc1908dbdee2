"""Addresses: what changes them and, as important, what does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.manifest import Request
from gpt2.plan import Plan, checkpoint, plan, prepare
from gpt2.recipe import load, load_runtime


def planned(tmp_path: Path, recipe: str = "124m", **overrides: object) -> Plan:
    return plan(load(recipe, {key.replace("__", "."): value for key, value in overrides.items()}), tmp_path)


def test_the_learning_rate_reaches_training_and_what_follows_only(tmp_path: Path) -> None:
    """An address too wide tokenizes 10B tokens again for a learning rate; one too narrow reuses a stale model."""
    before = planned(tmp_path).requests()
    after = planned(tmp_path, train__optim__max_lr=1e-3).requests()
    changed = {name for name in before if before[name].address != after[name].address}
    assert changed == {"train", "evaluate", "report"}


def test_tokenization_reaches_everything_after_it(tmp_path: Path) -> None:
    before = planned(tmp_path).requests()
    after = planned(tmp_path, tokenize__shard_tokens=50_000_000).requests()
    changed = {name for name in before if before[name].address != after[name].address}
    assert changed == {"tokenize", "train", "evaluate", "report"}


def test_sizes_share_data_and_benchmark(tmp_path: Path) -> None:
    small, large = planned(tmp_path, "350m"), planned(tmp_path, "774m")
    assert small.tokenize.address == large.tokenize.address
    assert small.benchmarks["hellaswag"].address == large.benchmarks["hellaswag"].address
    assert small.train.address != large.train.address


def test_a_benchmark_for_the_end_does_not_train_again(tmp_path: Path) -> None:
    before = planned(tmp_path)
    after = planned(
        tmp_path, benchmarks__held_out={"kind": "continuation"}, evaluate__benchmarks=["hellaswag", "held_out"]
    )
    assert before.train.address == after.train.address
    assert before.evaluate.address != after.evaluate.address


def test_the_runtime_changes_no_address(tmp_path: Path) -> None:
    request = planned(tmp_path).train
    one = prepare(request, load_runtime(None, {"runtime.store": str(tmp_path), "runtime.gpus": 1}))
    eight = prepare(request, load_runtime(None, {"runtime.store": str(tmp_path), "runtime.gpus": 8}))
    assert one == eight == tmp_path / request.address
    assert json.loads((one / "runtime.json").read_text())["gpus"] == 8


def test_hints_are_not_part_of_the_address() -> None:
    here = Request(stage="download", version=1, config={"a": 1}, hints={"paths": ["/here"]})
    there = Request(stage="download", version=1, config={"a": 1}, hints={"paths": ["/there"]})
    assert here.address == there.address
    assert here.address != Request(stage="download", version=2, config={"a": 1}).address


def test_an_address_is_the_same_in_every_process(tmp_path: Path) -> None:
    """A hash that depends on PYTHONHASHSEED would never hit."""
    command = [sys.executable, "-m", "gpt2.plan", "124m", f"runtime.store={tmp_path}"]
    listings = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(listings) == 1
    listing = listings.pop()
    assert planned(tmp_path).train.address in listing
    assert not any(tmp_path.glob("train/*")), "listing a plan writes nothing into it"


def test_write_makes_directories_that_a_stage_can_start_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpt2.plan", "124m", "--write", f"runtime.store={tmp_path}"]
    subprocess.run(command, capture_output=True, check=True)
    request = planned(tmp_path).tokenize
    written = Request.model_validate_json((tmp_path / request.address / "request.json").read_bytes())
    assert written.address == request.address


def test_checkpoint_of_an_unfinished_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training is not finished"):
        checkpoint(planned(tmp_path), tmp_path)


def test_other_weights_to_begin_from_are_another_training(tmp_path: Path) -> None:
    """Hashing only the path would silently reuse a model that began from what lay there before."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    first = planned(tmp_path, train__init_from=str(folder))
    pinned = first.train.config["init_sha256"]
    (folder / "model.safetensors").write_bytes(b"two")
    second = planned(tmp_path, train__init_from=str(folder))
    assert first.train.address != second.train.address
    with pytest.raises(UserError, match=r"train\.init_sha256 says"):
        planned(tmp_path, train__init_from=str(folder), train__init_sha256=pinned)
