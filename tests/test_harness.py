"""Our HellaSwag beside that of the real lm-evaluation-harness, example by example, without a network."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'reproduce-gpt2[harness]'")

from gpt2 import agreement, harness
from gpt2.checkpoint import save_model
from gpt2.config import ModelConfig
from gpt2.errors import UserError
from gpt2.measure import Measurement, how
from gpt2.model import GPT
from gpt2.tokenizer import gpt2_encoding

FIXTURE = Path(__file__).parent / "fixtures/hellaswag_small.jsonl"
REAL = Path(__file__).parent.parent.parent / "shared/data/hellaswag_val.jsonl.gz"
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
    lines = agreement.agreement(model, FIXTURE)
    check(lines, 12)
    assert all(line.too_close == 0 for line in lines if not line.why)
    by_chars, by_bytes = lines[1], lines[2]
    assert (by_chars.metric, by_bytes.metric) == ("acc_norm", "acc_bytes")


@pytest.mark.slow
def test_the_same_choices_on_the_real_hellaswag(model: Path, tmp_path: Path) -> None:
    """Would catch: what only real texts have, in the first 80 examples."""
    check(agreement.agreement(model, real_examples(tmp_path, 80)), 80)


@pytest.mark.slow
def test_the_same_log_probabilities(model: Path, tmp_path: Path) -> None:
    """Would catch: choices that agree by luck."""
    from gpt2.benchmark import prepare_files
    from gpt2.config import Runtime
    from gpt2.distributed import SOLO
    from gpt2.examples import load
    from gpt2.multiple_choice import sequence_sums
    from gpt2.pretrained import load_any

    found = harness.run_harness(model, ["hellaswag"], data={"hellaswag": FIXTURE})
    theirs = harness.choices(found.samples["hellaswag"])
    prepare_files("hellaswag", "harness", [FIXTURE], tmp_path / "ours")
    gpt = load_any(model)
    sums = sequence_sums(gpt, load(tmp_path / "ours"), SOLO)
    np.testing.assert_allclose(sums.losses, [-log for sample in theirs for log in sample.log_probs], rtol=1e-5)
    score = Measurement(gpt, SOLO, how(Runtime(), SOLO, 256)).benchmark("hellaswag", tmp_path / "ours").score
    names = {"acc": score.acc, "acc_norm": score.acc_norm_chars, "acc_bytes": score.acc_norm_bytes}
    assert {name: found.figures["hellaswag"][name] for name in names} == pytest.approx(names)


@pytest.mark.slow
def test_other_tasks_agree_too(model: Path, tmp_path: Path) -> None:
    """Would catch: prompts of LAMBADA, ARC, PIQA or WinoGrande that are not the harness's."""
    from gpt2.benchmark import prepare_files
    from gpt2.distributed import SOLO
    from gpt2.examples import load
    from gpt2.multiple_choice import score, sequence_sums
    from gpt2.pretrained import load_any

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
    found = harness.run_harness(model, list(rows), data=files)
    assert found.skipped == {}
    gpt = load_any(model)
    for task, file in files.items():
        prepare_files(kinds.get(task, task), "", [file], tmp_path / task)
        prepared = load(tmp_path / task)
        ours = score(prepared, sequence_sums(gpt, prepared, SOLO))
        theirs = found.figures[task]
        assert theirs["acc"] == pytest.approx(ours.acc), task
        if ours.acc_norm_chars is not None:
            assert theirs["acc_norm"] == pytest.approx(ours.acc_norm_chars), task
        if task == "lambada_openai":
            assert theirs["perplexity"] == pytest.approx(ours.perplexity, rel=1e-4)


@pytest.mark.slow
def test_a_task_without_data_is_named(model: Path) -> None:
    """Would catch: one task that cannot be had taking the others with it, or vanishing."""
    found = harness.run_harness(model, ["hellaswag", "piqa"], data={"hellaswag": FIXTURE}, limit=2)
    assert list(found.figures) == ["hellaswag"] and list(found.skipped) == ["piqa"]
    with pytest.raises(UserError, match="piqa could not be run: "):
        harness.run_harness(model, ["piqa"], limit=2)
