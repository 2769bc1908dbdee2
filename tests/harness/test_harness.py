"""Our HellaSwag beside that of the real lm-evaluation-harness, example by example, without a network."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from trained_store import store_with_a_training

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'reproduce-gpt2[harness]'")

from paths import FIXTURES, SHARED_DATA

from bench import harness_agreement as agreement
from gpt2.config.recipe import load
from gpt2.config.runtime import Runtime
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.evaluate.evaluator import Evaluator, eval_settings
from gpt2.harness import lm_eval as harness
from gpt2.model.checkpoint import save_model
from gpt2.model.gpt import GPT
from gpt2.plan import harness_request, prepare
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import HarnessFacts
from gpt2.stage.manifest import Request, read_model
from gpt2.tokenizer import gpt2_encoding

FIXTURE = FIXTURES / "hellaswag_small.jsonl"
REAL = SHARED_DATA / "hellaswag_val.jsonl.gz"
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained for some steps on sentences like those it will be asked about: it has opinions."""
    torch.manual_seed(0)
    text = " ".join(json.loads(line)["ctx"] for line in FIXTURE.read_text().splitlines())
    tokens = torch.tensor(gpt2_encoding().encode_ordinary(text))
    gpt = GPT(SMALL)
    gpt.init_weights(5)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for step in range(25):
        start = 7 * step % (len(tokens) - 65)
        _, loss = gpt(tokens[None, start : start + 64], tokens[None, start + 1 : start + 65])
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_model(folder, gpt)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would ask the Hub fails at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def real_examples(folder: Path, count: int) -> Path:
    """The first so many examples of the real HellaSwag."""
    if not REAL.exists():
        pytest.skip(f"{REAL} is not there")
    path = folder / "hellaswag_val.jsonl"
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        path.write_text("".join(islice(file, count)), encoding="utf-8")
    return path


def check(lines: list[agreement.Line], examples: int) -> None:
    print(agreement.table(lines))
    same = [line for line in lines if not line.why]
    assert [line.metric for line in same] == ["acc", "acc_norm", "acc_bytes"]
    for line in same:
        assert line.examples == examples
        assert line.same + line.too_close == examples, f"{line.name}: chosen otherwise by the same method"
        assert line.accuracy == pytest.approx(line.theirs, abs=(line.too_close + 0.5) / examples)
    assert all(line.why for line in lines if line.name not in {one.name for one in same})


@pytest.mark.slow
def test_the_same_choices_on_every_example_of_our_own(model: Path) -> None:
    """Would catch: another cleaning of WikiHow's markers, capital letters, another cut between context and ending,
    lengths in bytes for characters (the examples have accents, quotation marks, dashes and emoji)."""
    lines = agreement.agreement(model, FIXTURE, device="cpu")
    check(lines, 12)
    assert all(line.too_close == 0 for line in lines if not line.why)
    by_chars, by_bytes = lines[1], lines[2]
    assert (by_chars.metric, by_bytes.metric) == ("acc_norm", "acc_bytes")


@pytest.mark.slow
def test_the_same_choices_on_the_real_hellaswag(model: Path, tmp_path: Path) -> None:
    """Would catch: what only real texts have, in the first 80 examples."""
    check(agreement.agreement(model, real_examples(tmp_path, 80), device="cpu"), 80)


@pytest.mark.slow
def test_the_same_log_probabilities(model: Path, tmp_path: Path) -> None:
    """Would catch: choices that agree by luck."""
    from gpt2.benchmark.examples import load
    from gpt2.benchmark.stage import prepare_files
    from gpt2.config.runtime import Runtime
    from gpt2.distributed import SINGLE_PROCESS
    from gpt2.evaluate.sequence_losses import sequence_losses
    from gpt2.model.load import load_any

    found = harness.run_harness(model, ["hellaswag"], data={"hellaswag": FIXTURE}, device="cpu")
    theirs = harness.choices(found.samples["hellaswag"])
    prepare_files("hellaswag", "harness", [FIXTURE], tmp_path / "ours")
    gpt = load_any(model)
    sums = sequence_losses(gpt, load(tmp_path / "ours"), SINGLE_PROCESS)
    np.testing.assert_allclose(sums.losses, [-log for sample in theirs for log in sample.log_probs], rtol=1e-5)
    score = (
        Evaluator(gpt, SINGLE_PROCESS, eval_settings(Runtime(), SINGLE_PROCESS, 256))
        .benchmark("hellaswag", tmp_path / "ours")
        .score
    )
    names = {"acc": score.acc, "acc_norm": score.acc_norm_chars, "acc_bytes": score.acc_norm_bytes}
    assert {name: found.figures["hellaswag"][name] for name in names} == pytest.approx(names)


@pytest.mark.slow
def test_other_tasks_agree_too(model: Path, tmp_path: Path) -> None:
    """Would catch: prompts of LAMBADA, ARC, PIQA or WinoGrande that are not the harness's."""
    from gpt2.benchmark.examples import load
    from gpt2.benchmark.stage import prepare_files
    from gpt2.distributed import SINGLE_PROCESS
    from gpt2.evaluate.multiple_choice import score
    from gpt2.evaluate.sequence_losses import sequence_losses
    from gpt2.model.load import load_any

    words = [json.loads(line) for line in FIXTURE.read_text().splitlines()]
    rows = {
        "lambada_openai": [{"text": row["ctx"]} for row in words],
        "arc_easy": [
            {"id": str(n), "question": row["ctx"], "answerKey": "ABC"[n % 3],
             "choices": {"text": row["endings"][:3], "label": ["A", "B", "C"]}} for n, row in enumerate(words)],
        "piqa": [{"goal": row["ctx"], "sol1": row["endings"][0], "sol2": row["endings"][1], "label": n % 2}
                 for n, row in enumerate(words)],
        "winogrande": [{"sentence": f"{row['ctx']} and _ saw it happen, {n} times.", "option1": "Ann",
                        "option2": "the other one", "answer": str(1 + n % 2)} for n, row in enumerate(words)],
    }  # fmt: skip
    kinds = {"lambada_openai": "lambada", "arc_easy": "arc"}
    files = {}
    for task, examples in rows.items():
        files[task] = tmp_path / f"{task}.jsonl"
        files[task].write_text("".join(json.dumps(row) + "\n" for row in examples))
    found = harness.run_harness(model, list(rows), data=files, device="cpu")
    assert found.skipped == {}
    gpt = load_any(model)
    for task, file in files.items():
        prepare_files(kinds.get(task, task), "", [file], tmp_path / task)
        prepared = load(tmp_path / task)
        ours = score(prepared, sequence_losses(gpt, prepared, SINGLE_PROCESS))
        theirs = found.figures[task]
        assert theirs["acc"] == pytest.approx(ours.acc), task
        if ours.acc_norm_chars is not None:
            assert theirs["acc_norm"] == pytest.approx(ours.acc_norm_chars), task
        if task == "lambada_openai":
            assert theirs["perplexity"] == pytest.approx(ours.perplexity, rel=1e-4)


@pytest.mark.slow
def test_a_task_without_data_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: one task that cannot be had taking the others with it, or vanishing."""
    found = harness.run_harness(model, ["hellaswag", "piqa"], data={"hellaswag": FIXTURE}, limit=2, device="cpu")
    assert list(found.figures) == ["hellaswag"] and list(found.skipped) == ["piqa"]
    with pytest.raises(UserError, match="piqa could not be run: "):
        harness.run_harness(model, ["piqa"], limit=2, device="cpu")
    assert "Hub" in capsys.readouterr().err  # silence while its client retries


class Asked(Exception):
    """Stops what is tested once it has named its device."""


def test_a_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Would catch: hours on the CPU beside an idle GPU, where the same evaluation of ours would have used it."""

    def ask(device: object) -> None:
        raise Asked(str(device))

    fake = harness._Harness("0", lambda *, device, **_: ask(device), None, None)
    monkeypatch.setattr(harness, "_harness", lambda: fake)
    monkeypatch.setattr(harness, "export_hf", lambda model, out: out)
    monkeypatch.setattr(agreement, "load_any", lambda model, device: ask(device))
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(Asked, match=device):
            harness.main([str(tmp_path), "hellaswag"])
        with monkeypatch.context() as patched:
            results = harness.HarnessResults("0", {}, {"hellaswag": []}, {})
            patched.setattr(agreement, "run_harness", lambda *_, results=results, **__: results)
            with pytest.raises(Asked, match=device):
                agreement.main([str(tmp_path), str(FIXTURE)])
    with pytest.raises(UserError, match="finds no GPU"):
        harness.main([str(tmp_path), "hellaswag", "--device", "cuda"])


def harness_stage(store: Path, **section: object) -> Path:
    """The stage's directory for a finished training in `store`."""
    gpt = GPT(SMALL.model_copy(update={"block_size": 128}))
    gpt.init_weights(5)
    trained = store_with_a_training(store, gpt).relative_to(store)
    config = load("demo", {"harness": {"tasks": ["hellaswag"], "limit": 6, **section}}).harness
    assert config is not None
    train = read_model(store / trained / "request.json", Request)
    return prepare(harness_request(config, train, store), Runtime(store=store, gpus=0))


@pytest.mark.slow
def test_as_a_stage(tmp_path: Path) -> None:
    """Would catch: another model measured than the one that was trained, data of one task given to another, a hole
    taken for a result."""
    directory = harness_stage(tmp_path, data={"hellaswag": str(FIXTURE)})
    words = [sys.executable, "-m", "gpt2.harness"]
    done = subprocess.run([*words, str(directory)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = StageDir(directory).facts(HarnessFacts)
    checkpoint = next(tmp_path.glob("train/*/checkpoints/step_00000020"))
    alone = harness.run_harness(checkpoint, ["hellaswag"], data={"hellaswag": FIXTURE}, limit=6, device="cpu")
    assert facts.figures == alone.figures and facts.examples == {"hellaswag": 6}

    other = harness_stage(tmp_path)  # from the Hub, which is not there
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*words, str(other)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2 and "error: hellaswag could not be run" in done.stderr
    assert other != directory and not (other / "manifest.json").exists()


def test_a_harness_that_is_not_there_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: days of training, and then a package that is missing."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"pip install 'reproduce-gpt2\[harness\]'"):
        harness_stage(tmp_path)
