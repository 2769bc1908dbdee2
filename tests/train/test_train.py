"""The training loop: what it writes, what it does about trouble, and against a loop written out plainly."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import CONFIG, assert_same, faulty, lines, make_run, make_shards, result, run, set_runtime, steps

from gpt2.config.train import AnomalyConfig, ModelConfig, TrainConfig
from gpt2.machine import AUTOTUNE_CACHE, keep_compiled, user_cache
from gpt2.model.checkpoint import load_model, save_model
from gpt2.model.gpt import GPT
from gpt2.model.weights import to_hf
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import TrainFacts
from gpt2.train.anomaly import AnomalyDetector, z_score
from gpt2.train.loader import Loader
from gpt2.train.optim import learning_rate


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_run(tmp_path_factory.mktemp("train"))
    run(directory)
    return directory


def plain_run(directory: Path) -> tuple[GPT, list[float]]:
    """The same run as one reads it in a textbook: whole batches, torch's own AdamW and clipping."""
    config = StageDir(directory).config(TrainConfig)
    shards = sorted((StageDir(directory).input("shards").path / "shards").glob("*train*"))
    loader = Loader(shards, 16, 12, config.seed, 300)
    model = GPT(config.model)
    model.init_weights(42)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )  # fmt: skip
    losses = []
    for step in range(12):
        batch = loader.batch(step, slice(0, 12))
        loss = model(batch.idx, batch.targets)[1]
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, 12, step)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.slow
def test_training_is_the_plain_loop(finished: Path) -> None:
    """Bugs: gradients accumulated with a wrong weight, clipped too early, a learning rate one step off."""
    model, losses = plain_run(finished)
    got = [line["train/loss"] for line in lines(finished / "metrics.jsonl") if "train/loss" in line]
    assert got == pytest.approx(losses, rel=1e-5)
    weights = result(finished)["weights"]
    for name, tensor in to_hf(model).items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=5e-5)
    assert losses[-1] < losses[0] - 0.5  # it does learn


def test_what_a_run_leaves(finished: Path) -> None:
    """Bugs: a line missing at step 0 or at the end, tokens counted wrongly, a manifest that names no checkpoint."""
    metrics = lines(finished / "metrics.jsonl")
    assert [line["step"] for line in metrics if "val/loss" in line] == [0, 4, 8, 12]
    assert [line["step"] for line in metrics if "train/loss" in line] == list(range(1, 13))
    assert all(line["train/tokens"] == 192 * line["step"] for line in metrics)
    assert all(line["done"] == line["step"] and line["total"] == 12 and line["unit"] == "steps" for line in metrics)
    facts = StageDir(finished).facts(TrainFacts)
    assert (facts.steps, facts.tokens, facts.world_size, facts.precision) == (12, 2304, 1, "fp32")
    assert facts.n_params == sum(
        t.numel() for t in load_file(finished / facts.checkpoint / "model.safetensors").values()
    )
    assert facts.train_loss == metrics[-2]["train/loss"] and facts.val_loss == metrics[-1]["val/loss"]
    assert 0 < facts.train_seconds < facts.total_seconds and facts.mfu is None and facts.device == "cpu"
    manifest = StageDir(finished).manifest
    assert manifest is not None and not manifest.problems(finished, deep=True)
    assert {entry.path.split("/")[-1] for entry in manifest.files} == {
        "model.safetensors", "optimizer.safetensors", "config.json", "state.json", "metrics.jsonl",
    }  # fmt: skip
    model = load_model(finished / facts.checkpoint)
    assert model.config == ModelConfig.model_validate(CONFIG["model"])


@pytest.mark.slow
def test_training_from_given_weights(tmp_path: Path) -> None:
    """Bug: init_from read after the random weights overwrote it, or ignored."""
    model = GPT(ModelConfig.model_validate(CONFIG["model"]))
    model.init_weights(7)
    save_model(tmp_path / "start", model)
    directory = make_run(tmp_path, init_from=str(tmp_path / "start"), max_steps=3)
    run(directory)
    config = StageDir(directory).config(TrainConfig)
    shards = sorted((StageDir(directory).input("shards").path / "shards").glob("*train*"))
    batch = Loader(shards, 16, 12, config.seed, 300).batch(0, slice(0, 12))
    loss = model(batch.idx, batch.targets)[1]
    assert loss is not None
    assert lines(directory / "metrics.jsonl")[1]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_documents_aligned(tmp_path: Path) -> None:
    """Bug: align_documents read but not obeyed."""
    directory = make_run(
        tmp_path, make_shards(tmp_path, eot=True), align_documents=True, max_steps=3,
        model={**CONFIG["model"], "vocab_size": 50_257},
    )  # fmt: skip
    output = run(directory)
    assert "document starts use 1" in output  # 16 of each 100 tokens
    assert (directory / "aligned_starts.npy").exists()


# --------------------------------------------------------------------------------------------------------- anomalies


def test_z_score_is_llmcs() -> None:
    """Bug: a z-score against a window without the value, by which llm.c's thresholds would mean something else."""
    assert z_score([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(2 / 3))
    assert z_score([5.0] * 4) == 0.0
    assert z_score([0.0] * 127 + [1.0]) == pytest.approx(127 / math.sqrt(127))  # the most there can be


def test_verdicts() -> None:
    """Bugs: judging before the window is full, a fall of the loss taken for a spike, NaN remembered."""
    config = AnomalyConfig(on_spike="skip", on_nonfinite="rollback", window=10, loss_z=2.5, grad_z=2.5)
    detector = AnomalyDetector(config)
    assert detector.check(100.0, 1.0).action == "continue"  # the window is not full
    for i in range(9):
        assert detector.check(3.0 + 0.01 * (i % 2), 1.0 + 0.01 * (i % 3)).action == "continue"
    detector.losses[0] = 3.0
    assert detector.check(math.nan, 1.0) == ("rollback", "not finite", pytest.approx(math.nan, nan_ok=True), None)
    assert detector.check(3.0, math.inf).kind == "not finite"
    assert len(detector.losses) == 10 and math.isfinite(sum(detector.losses))
    assert detector.check(1.0, 1.0).action == "continue"
    verdict = detector.check(9.0, 1.0)
    assert (verdict.action, verdict.kind, verdict.value) == ("skip", "loss spike", 9.0)
    assert verdict.z is not None and verdict.z > 2.5
    assert detector.check(3.0, 7.0).kind == "gradient spike"


def poisoned(store: Path, *poison: int, **changes: Any) -> Path:
    """A run in whose data some steps hold nothing but a token that no other step has."""
    directory = make_run(store, **changes)
    config = StageDir(directory).config(TrainConfig)
    shards = sorted((StageDir(directory).input("shards").path / "shards").glob("*train*"))
    loader = Loader(shards, 16, 12, config.seed, 300)
    streams = [bytearray(path.read_bytes()) for path in shards]
    places = [(shard, 1024 + 2 * i) for shard, size in ((0, 1400), (1, 2000)) for i in range(size)]
    for number in (number for step in poison for number in loader.sequences(step)):
        for shard, at in places[number * 16 : number * 16 + 16]:
            streams[shard][at : at + 2] = (299).to_bytes(2, "little")
    for path, stream in zip(shards, streams, strict=True):
        path.write_bytes(stream)
    return directory


SPIKY = {"on_spike": "skip", "window": 4, "loss_z": 1.4, "grad_z": 100.0}  # 1.5 is the most that 4 values give


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback", "stop", "warn"])
def test_a_spike_is_handled_as_the_config_says(tmp_path: Path, action: str) -> None:
    """Bugs: weights changed though the step was to be skipped; a rollback into the same data; metrics doubled."""
    directory = poisoned(tmp_path, 9, anomalies={**SPIKY, "on_spike": action})
    output = run(directory, expect=2 if action == "stop" else 0)
    (found,) = [line for line in lines(directory / "anomalies.jsonl") if line["kind"] == "loss spike"]
    assert found["action"] == action and found["z"] > 1.4
    if action == "stop":
        assert "error: step 10: loss spike" in output and steps(directory)[-1] == 9
        return
    outcome = result(directory)
    assert [line["step"] for line in outcome["metrics"] if "train/loss" in line] == list(range(1, 13))
    passed_over, skips = outcome["losses"][2:]
    if action == "rollback":  # to step 8; its data and that of the spike are passed over
        assert (found["step"], found["seen_at"], passed_over, skips) == (8, 10, 2, 1)
    else:
        assert (found["step"], passed_over, skips) == (10, 0, int(action == "skip"))


@pytest.mark.slow
def test_going_back_twice_passes_over_all_that_was_bad(tmp_path: Path) -> None:
    """Bug: the second return to a checkpoint forgets the first, and meets the same data again."""
    directory = poisoned(tmp_path, 9, 11, anomalies={**SPIKY, "on_spike": "rollback"})
    run(directory)
    found = [line for line in lines(directory / "anomalies.jsonl") if line["kind"] == "loss spike"]
    assert [(line["step"], line["passed_over"], line["skips"]) for line in found] == [(8, 2, 1), (8, 4, 2)]
    assert result(directory)["losses"][2:] == (4, 2)


@pytest.mark.slow
def test_a_run_killed_after_going_back_does_not_go_back_again(tmp_path: Path) -> None:
    """Bug: until the next checkpoint a resume knows nothing of the data that was passed over: it meets the same spike,
    and writes it down twice."""
    anomalies = {**SPIKY, "on_spike": "rollback"}
    whole, killed = (poisoned(tmp_path / name, 9, anomalies=anomalies) for name in ("whole", "killed"))
    run(whole)
    run(killed, expect=-9, words=faulty(killed, 1, "SIGKILL", "step", 0, step=10))
    assert "loss spike" not in run(killed)
    assert_same(result(killed), result(whole))
    assert lines(killed / "anomalies.jsonl") == lines(whole / "anomalies.jsonl")


@pytest.mark.slow
def test_too_many_skips_stop(tmp_path: Path) -> None:
    """Bug: a run that has diverged skips for ever. Weights that overflow make every loss NaN."""
    model = GPT(ModelConfig.model_validate(CONFIG["model"]))
    model.init_weights(7)
    with torch.no_grad():
        model.transformer.ln_f.weight[:] = math.inf
    save_model(tmp_path / "start", model)
    anomalies = {"on_nonfinite": "skip", "max_skips": 3}
    directory = make_run(tmp_path, init_from=str(tmp_path / "start"), anomalies=anomalies)
    output = run(directory, expect=2)
    assert "error: step 4: not finite: nan; 4 steps" in output
    assert [line["action"] for line in lines(directory / "anomalies.jsonl")] == ["skip", "skip", "skip", "stop"]
    for text in (directory / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.slow
def test_errors_are_one_line_and_status_2(tmp_path: Path) -> None:
    """Bug: a traceback where the user only has to put something right, or a status that says success."""
    directory = make_run(tmp_path)
    set_runtime(directory, micro_batch_size=100)  # more than there are is no error
    shard = next((StageDir(directory).input("shards").path / "shards").glob("*train_000001*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    output = run(directory, expect=2)
    assert output.startswith("error: shard ") and "1,395" in output and output.count("\n") == 1
    shard.write_bytes(data)
    (directory / "checkpoints").mkdir(exist_ok=True)
    (directory / "checkpoints" / "step_00000004").mkdir()
    output = run(directory, expect=2)
    assert "warning: checkpoint step_00000004 cannot be used" in output and "error: none of the 1" in output
    (directory / "checkpoints" / "step_00000004").rmdir()
    run(directory)


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_stop_a_run(tmp_path: Path, finished: Path) -> None:
    """Bug: metrics between the two checkpoints doubled after the fall back."""
    directory = make_run(tmp_path)
    run(directory)
    (directory / "manifest.json").unlink()
    weights = load_file(directory / "checkpoints/step_00000012/model.safetensors")
    save_file(weights, directory / "checkpoints/step_00000012/model.safetensors", metadata={"format": "other"})
    output = run(directory)
    assert "warning: checkpoint step_00000012 cannot be used" in output and "resuming after step 8 " in output
    assert result(directory)["metrics"] == result(finished)["metrics"]


def test_compiled_code_is_kept_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: code from a copied store is executed; another user can write to the folder; every start compiles again; a
    folder that the user has chosen is not used."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    fa4 = [f"FLASH_ATTENTION_CUTE_DSL_CACHE_{what}" for what in ("DIR", "ENABLED")]
    for variable in ("TORCHINDUCTOR_CACHE_DIR", AUTOTUNE_CACHE, *fa4):
        monkeypatch.setenv(variable, "")  # noted as not there, for the end of the test
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "reproduce-gpt2").mkdir(mode=0o777)
    keep_compiled()
    folder = tmp_path / "reproduce-gpt2" / "compiled"
    assert (tmp_path / "reproduce-gpt2").stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == "/chosen"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert os.environ[AUTOTUNE_CACHE] == str(folder / "autotune")
    assert [os.environ[variable] for variable in fa4] == [str(folder / "flash-attn-4"), "1"]


def test_a_cache_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: code is loaded from a folder that another user created under our name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "reproduce-gpt2" / "compiled").mkdir(parents=True)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    folder = user_cache("compiled")
    assert tmp_path not in folder.parents and folder.parent.stat().st_mode & 0o777 == 0o700
