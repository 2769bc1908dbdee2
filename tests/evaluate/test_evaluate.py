"""gpt2/evaluate.py and measure.py: the stage, alone on any folder, and the same on one process and on four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import FIXTURES
from tiny_evaluation import TINY, evaluation, prepared, tiny_model, trained, words_everywhere  # noqa: F401
from tiny_run import make_shards, run, start

from gpt2.benchmark.examples import load
from gpt2.config.runtime import Runtime
from gpt2.distributed import SINGLE_PROCESS
from gpt2.errors import UserError
from gpt2.evaluate.evaluator import Evaluator, digits, eval_settings
from gpt2.evaluate.stage import Scores, parser, prepare_benchmarks, work
from gpt2.evaluate.validation import val_loss
from gpt2.model.checkpoint import save_model
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import EvaluateFacts
from gpt2.stage.manifest import read_model, write_model
from gpt2.stage.metrics import read_metrics

FIXTURE = FIXTURES / "hellaswag_small.jsonl"


@pytest.mark.slow
def test_the_stage_measures_and_says_what_it_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: figures of other tokens than asked for, a short validation shard that nobody hears of, and a
    benchmark that is left out in silence."""
    directory = evaluation(tmp_path, val_tokens=1000, missing=("arc-easy",))
    work(StageDir(directory), SINGLE_PROCESS)
    facts = StageDir(directory).facts(EvaluateFacts)
    shard = tmp_path / make_shards(tmp_path, tokens=4000, eot=True).address / "shards/tiny_val_000000.bin"
    assert facts.val_tokens == 599 and facts.val_loss == val_loss(tiny_model(), [shard], 599, 64, SINGLE_PROCESS).loss
    assert list(facts.scores) == ["held-out"] and facts.scores["held-out"].examples == 12
    assert facts.skipped == {"arc-easy": "no network"} and facts.precision == "fp32"
    printed = capsys.readouterr().out
    assert "599 tokens" in printed and "1,000" in printed and "arc-easy: skipped, no network" in printed
    scores = read_model(directory / "scores.json", Scores)
    chosen = scores.benchmarks["held-out"].chosen["continuation"]
    right = sum(a == b for a, b in zip(chosen.labels, chosen.by_sum, strict=True))
    assert len(chosen.labels) == 12 and right / 12 == pytest.approx(facts.scores["held-out"].acc)
    last = list(read_metrics(directory / "metrics.jsonl"))[-1]
    assert last["done"] == last["total"]


@pytest.mark.slow
def test_what_is_measured_is_kept(tmp_path: Path) -> None:
    """Would catch: an evaluation of hours that starts from nothing after a kill, or that takes over a figure of
    another precision."""
    directory = evaluation(tmp_path)
    work(StageDir(directory), SINGLE_PROCESS)
    kept = directory / "measured/fp32/validation.json"
    value = json.loads(kept.read_text())
    kept.write_text(json.dumps(value | {"val_loss": 1.25}))  # a mark to know it by
    (directory / "manifest.json").unlink()
    work(StageDir(directory), SINGLE_PROCESS)
    assert StageDir(directory).facts(EvaluateFacts).val_loss == 1.25
    runtime = Runtime(store=tmp_path, gpus=0, precision="bf16")
    write_model(directory / "runtime.json", runtime)
    work(StageDir(directory), SINGLE_PROCESS)
    facts = StageDir(directory).facts(EvaluateFacts)
    assert facts.precision == "bf16" and facts.val_loss == pytest.approx(value["val_loss"], abs=0.05)


def test_a_fresh_evaluation_has_the_same_bytes(tmp_path: Path) -> None:
    """Would catch: time stamps or an order of dictionaries in scores.json."""
    written = []
    for name in ("a", "b"):
        directory = evaluation(tmp_path / name)
        work(StageDir(directory), SINGLE_PROCESS)
        written.append((directory / "scores.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
def test_one_and_four_processes_give_the_same_numbers(tmp_path: Path) -> None:
    """Would catch: rank 0's share taken for the whole, a process that waits for ever, and two of them writing."""
    written = []
    for processes in (1, 4):
        directory = evaluation(tmp_path / str(processes), micro_batch_size=2)
        command = [sys.executable, "-m", "gpt2.evaluate", str(directory)]
        if processes > 1:
            command[2:3] = [
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
                "-m",
                "gpt2.evaluate",
            ]
        run(directory, words=command)
        written.append((directory / "scores.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
def test_alone_on_any_folder(tmp_path: Path) -> None:
    """Would catch: an evaluation that only works inside a store, or gives other figures there; an error of the user's
    that comes as a traceback."""
    save_model(tmp_path / "model", tiny_model())
    shards = make_shards(tmp_path, tokens=4000)
    shard = tmp_path / shards.address / "shards/tiny_val_000000.bin"
    out = tmp_path / "scores.json"
    command = [
        sys.executable, "-m", "gpt2.evaluate", "--folder", str(tmp_path / "model"), "--shards", str(shard),
        "--benchmark", f"hellaswag={FIXTURE}", f"hellaswag:harness={FIXTURE}", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    process = start(tmp_path, words=command)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    scores = read_model(out, Scores)
    assert scores.val_loss == val_loss(tiny_model(), [shard], 599, 64, SINGLE_PROCESS).loss and scores.val_tokens == 599
    assert {name: result.score.prompt for name, result in scores.benchmarks.items()} == {
        "hellaswag": "llm.c",
        "hellaswag:harness": "harness",
    }
    measured = Evaluator(tiny_model(), SINGLE_PROCESS, eval_settings(Runtime(), SINGLE_PROCESS, 64))
    directories = prepare_benchmarks([f"hellaswag={FIXTURE}"], tmp_path / "scratch")
    assert measured.benchmark("hellaswag", directories["hellaswag"]) == scores.benchmarks["hellaswag"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for wrong, message in (
        (["--folder", str(tmp_path / "nothing")], "no such file or folder"),
        (["--folder", str(tmp_path / "model"), "--benchmark", "hellaswg=x"], "'hellaswg'"),
        (["--folder", str(tmp_path / "model"), "--benchmark", "hellaswag"], "names no benchmark"),
    ):
        failed = subprocess.run(
            [sys.executable, "-m", "gpt2.evaluate", *wrong],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and message in failed.stderr
        assert "Traceback" not in failed.stderr


def test_an_unfinished_input_says_so(tmp_path: Path) -> None:
    """Would catch: figures of a training that is still going on."""
    directory = evaluation(tmp_path)
    stage = StageDir(directory)
    (tmp_path / stage.request.inputs["model"] / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        work(StageDir(directory), SINGLE_PROCESS)


def test_a_core_over_part_of_its_tasks_says_so(tmp_path: Path) -> None:
    """Would catch: a mean over some of CORE's tasks printed, and kept, as if it were CORE."""
    save_model(tmp_path / "model", tiny_model())
    tasks = [
        {"label": label, "dataset_uri": f"x/{label}.jsonl", "icl_task_type": "language_modeling", "num_fewshot": [0]}
        for label in ("here", "gone", "lost")
    ]
    folder = tmp_path / "core" / "eval_data" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "core" / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    (tmp_path / "core" / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nhere,0\ngone,0\nlost,0\n")
    (tmp_path / "core" / "README.md").write_text("not of the benchmark")
    (folder / "here.jsonl").write_text(json.dumps({"context": "One two", "continuation": "three"}) + "\n")
    directories = prepare_benchmarks([f"core={tmp_path / 'core'}"], tmp_path / "scratch")
    assert load(directories["core"]).description.origin == str(tmp_path / "core")
    world_way = eval_settings(Runtime(), SINGLE_PROCESS, 64)
    result = Evaluator(tiny_model(), SINGLE_PROCESS, world_way, tmp_path / "kept").benchmark(
        "core", directories["core"]
    )
    assert (
        Evaluator(tiny_model(), SINGLE_PROCESS, world_way, tmp_path / "kept").benchmark("core", Path("none")) == result
    )
    scores = Scores(model="m", precision="fp32", val_loss=None, val_tokens=None, benchmarks={"core": result})
    printed = "\n".join(scores.lines())
    assert "core: CORE over 1 of 3 tasks: centered 0.0000 of 1" in printed
    assert "gone: left out, core.yaml names x/gone.jsonl" in printed and "lost: left out, " in printed
    assert list(json.loads(scores.model_dump_json())["benchmarks"]["core"]["left_out"]) == ["gone", "lost"]
    with pytest.raises(UserError, match="holds no file of a benchmark"):
        (tmp_path / "empty").mkdir()
        prepare_benchmarks([f"core={tmp_path / 'empty'}"], tmp_path / "other")


def test_benchmarks_of_one_kind_need_names(tmp_path: Path) -> None:
    """Would catch: the first of two benchmarks with one name dropped without a word."""
    row = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    files = [tmp_path / "easy.jsonl", tmp_path / "challenge.jsonl"]
    for number, file in enumerate(files, 1):
        file.write_text(number * (json.dumps(row) + "\n"))
    easy, challenge = files
    for twice in ([f"arc={easy}", f"arc={challenge}"], [f"a=arc:{easy}", f"a=hellaswag:{FIXTURE}"]):
        with pytest.raises(UserError, match=r"^(arc|a) "):
            prepare_benchmarks(twice, tmp_path / "twice")
    given = [
        f"easy=arc:{easy}", f"both=arc:{easy},{challenge}", f"arc={challenge}", f"h=hellaswag:harness:{FIXTURE}",
        f"plain=hellaswag:llm.c:{FIXTURE}", f"hellaswag:harness={FIXTURE}", f"piqa=arc:{easy}",
    ]  # fmt: skip
    found = {name: load(path).description for name, path in prepare_benchmarks(given, tmp_path / "made").items()}
    assert {name: (one.kind, one.parts[0].examples) for name, one in found.items()} == {
        "easy": ("arc", 1), "both": ("arc", 3), "arc": ("arc", 2), "h": ("hellaswag", 12), "plain": ("hellaswag", 12),
        "hellaswag:harness": ("hellaswag", 12), "piqa": ("arc", 1),
    }  # fmt: skip
    assert (found["h"].prompt, found["plain"].prompt) == ("harness", "llm.c")
    with pytest.raises(UserError, match=r"'easy'.*hellaswag, lambada, arc"):
        prepare_benchmarks([f"easy={easy}"], tmp_path / "none")
    described = parser().format_help()
    assert all(word in described for word in ("winogrande", "hellaswag:harness", "NAME=KIND:FILE"))


def test_digits() -> None:
    """Would catch: the tenth answer written as two characters, which shifts every example after it."""
    assert digits(np.array([3, 0, 9, 10, 11], np.int16)) == "309ab" and digits(None) == ""
