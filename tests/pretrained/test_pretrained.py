"""gpt2/baseline.py and plan_baseline: other people's models, measured on the same tokens by the same code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import REVISION, Dataset, HubServer

from gpt2.benchmark import stage as benchmark
from gpt2.config.run import RunConfig
from gpt2.config.runtime import Runtime
from gpt2.distributed import SINGLE_PROCESS
from gpt2.download import stage as download
from gpt2.errors import UserError
from gpt2.evaluate.stage import work as evaluate
from gpt2.plan import plan, plan_baseline, prepare
from gpt2.pretrained import stage as baseline
from gpt2.shards import open_shard
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import EvaluateFacts, PretrainedFacts, TokenizeFacts
from gpt2.stage.manifest import Request
from gpt2.tokenize import stage as tokenize

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as transformers writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(31)
    path = tmp_path_factory.mktemp("hugging_face") / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, initializer_range=0.2)).save_pretrained(
        path
    )
    return path


def recipe(tmp_path: Path, **baselines: Any) -> RunConfig:
    text = tmp_path / "corpus.jsonl"
    words = np.random.default_rng(32).choice(["the", "river", "ran", "past", "old", "stones", "and", "into", "a"], 3000)
    documents = [{"text": " ".join(words[i : i + 150])} for i in range(0, 3000, 150)]
    text.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return RunConfig.model_validate(
        {
            "name": "small",
            "download": {"source": {"kind": "local", "paths": [str(text)]}},
            "tokenize": {"shard_tokens": 2000, "val_tokens": 2000},
            "benchmarks": {
                "held-out": {"kind": "continuation", "examples": 8, "context_tokens": 16, "ending_tokens": 8}
            },
            "train": {
                "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16},
                "optim": {"max_lr": 1e-3, "warmup_steps": 1},
                "total_batch_size": 16,
                "max_steps": 2,
            },
            "evaluate": {"val_tokens": 1000, "benchmarks": ["held-out"]},
            "baselines": baselines,
            "report": {"title": "x"},
        }
    )


def measured(config: RunConfig, name: str, store: Path) -> EvaluateFacts:
    """Run every stage of a baseline."""
    steps = plan_baseline(config, name, store)
    works = {
        "download": download.work,
        "tokenize": tokenize.tokenize,
        "pretrained": baseline.work,
        "benchmark": benchmark.work,
    }
    requests: list[Request] = [steps.download, steps.tokenize, *steps.benchmarks.values(), steps.pretrained]
    for request in requests:
        stage = StageDir(prepare(request, Runtime(store=store, gpus=0, tokenize_workers=1)))
        if stage.manifest is None:
            works[request.stage](stage)
    directory = prepare(steps.evaluate, Runtime(store=store, gpus=0))
    evaluate(StageDir(directory), SINGLE_PROCESS)
    return StageDir(directory).facts(EvaluateFacts)


@pytest.mark.slow
def test_a_local_folder_is_measured_as_transformers_would(tmp_path: Path, folder: Path) -> None:
    """Would catch: another shard, other windows, or weights that came over wrongly (transposed, another head)."""
    from transformers import GPT2LMHeadModel

    store = tmp_path / "store"
    config = recipe(tmp_path, openai={"kind": "local-model", "path": str(folder)})
    before = plan(config, store).report
    facts = measured(config, "openai", store)
    after = plan(config, store).report  # which can draw it now
    assert after.inputs == before.inputs | {"baseline:openai": plan_baseline(config, "openai", store).evaluate.address}
    assert list(facts.scores) == ["held-out"] and facts.val_tokens == 1000

    tokenized = store / plan(config, store).tokenize.address
    entry = next(shard for shard in StageDir(tokenized).facts(TokenizeFacts).shards if shard.split == "val")
    stream = torch.from_numpy(np.array(open_shard(tokenized / entry.path)[:1001], dtype=np.int64))
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    total = 0.0
    for start in range(0, 1000, 64):
        window = stream[start : min(start + 64, 1000) + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    assert facts.val_loss == pytest.approx(total / 1000, abs=1e-5) and not math.isclose(facts.val_loss, math.log(50257))


def test_it_shares_everything_but_the_model_with_the_recipe(tmp_path: Path, folder: Path) -> None:
    """Would catch: a baseline on a shard or benchmark of its own, which would compare nothing."""
    config = recipe(tmp_path, openai={"kind": "local-model", "path": str(folder)})
    ours, theirs = plan(config, tmp_path), plan_baseline(config, "openai", tmp_path)
    assert (theirs.download, theirs.tokenize, theirs.benchmarks) == (ours.download, ours.tokenize, ours.benchmarks)
    assert theirs.evaluate.config == ours.evaluate.config
    same = {role: address for role, address in ours.evaluate.inputs.items() if role != "model"}
    assert same.items() <= theirs.evaluate.inputs.items()
    assert theirs.evaluate.inputs["model"] == theirs.pretrained.address
    without = recipe(tmp_path)
    assert plan(without, tmp_path) == ours  # a baseline changes no address of the recipe's own
    with pytest.raises(UserError, match=r"small has no baseline 'opnai': baselines has openai"):
        plan_baseline(config, "opnai", tmp_path)


def test_other_weights_have_another_address(tmp_path: Path, folder: Path) -> None:
    """Would catch: a folder whose weights were replaced being answered with the old figures."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = recipe(tmp_path, openai={"kind": "local-model", "path": str(copy)})
    before = plan_baseline(config, "openai", tmp_path).pretrained.address
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    elsewhere = recipe(tmp_path, openai={"kind": "local-model", "path": str(moved)})
    assert plan_baseline(elsewhere, "openai", tmp_path).pretrained.address == before
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert plan_baseline(config, "openai", tmp_path).pretrained.address != before
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="nothing matches"):
        plan_baseline(config, "openai", tmp_path)


@pytest.mark.slow
def test_from_the_hub_it_is_the_same_model(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: models asked for at the addresses of data sets, and files whose hash nobody checked."""
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with HubServer() as hub:
        hub.datasets["openai-community/gpt2"] = Dataset(files | {"flax_model.msgpack": b"not asked for"})
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        source = {"kind": "hub-model", "repo": "openai-community/gpt2", "revision": REVISION}
        config = recipe(tmp_path, hub=source, local={"kind": "local-model", "path": str(folder)})
        store = tmp_path / "store"
        fetched = measured(config, "hub", store)
        assert not hub.requests("flax_model")
        assert hub.requests("api/models/openai-community/gpt2/tree")
    assert fetched == measured(config, "local", store)
    stage = StageDir(store / plan_baseline(config, "hub", store).pretrained.address)
    assert stage.facts(PretrainedFacts).origin == f"openai-community/gpt2@{REVISION}"
    assert stage.manifest is not None and stage.manifest.problems(stage.path, deep=True) == []
