"""The examples of CONTRIBUTING.md, applied to a copy of the repository."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.stage.facts import BenchmarkFacts, DownloadFacts, Facts
from gpt2.stage.manifest import Manifest, read_model
from gpt2.tokenizer import gpt2_encoding

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


def apply_diff(text: str, copy: Path) -> None:
    """Apply hunks that are found by their lines; each must occur exactly once."""
    for name, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", text, re.DOTALL | re.MULTILINE):
        content = (copy / name).read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert ("\n" + content).count("\n" + old) == 1, f"{name} does not contain this once:\n{old}"
            content = content.replace(old, new)
        (copy / name).write_text(content, encoding="utf-8")


def create_file(text: str, copy: Path) -> None:
    name, _, content = text.removeprefix("# ").partition("\n")
    path = copy / name
    assert not path.exists(), f"{name} exists"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")


def run(copy: Path, *command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_examples_of_contributing_run(tmp_path: Path) -> None:
    """Bugs: an example that names what was renamed, forgets a place that must change, or violates the layers."""
    copy = tmp_path / "copy"
    for folder in ("gpt2", "tasks", "flows", "bench", "conf"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)

    facts: dict[str, Facts] = {}
    outputs = []
    for language, text in BLOCKS:
        if language == "diff":
            apply_diff(text, copy)
        elif language == "bash":
            shutil.rmtree(copy / "store", ignore_errors=True)
            outputs.append(run(copy, "bash", "-euc", text))
            for path in copy.glob("store/[db]*/*/manifest.json"):  # the other facts are unknown to this process
                facts[path.parts[-3]] = read_model(path, Manifest).facts
        else:
            create_file(text, copy)

    assert re.search(r"^train +to do ", outputs[0], re.MULTILINE)
    download, benchmark = facts["download"], facts["benchmark"]
    assert isinstance(download, DownloadFacts) and download.files == ("data/00000-sums.jsonl",)
    assert isinstance(benchmark, BenchmarkFacts)
    assert (benchmark.kind, benchmark.examples, benchmark.chance) == ("boolq", 1, 0.5)
    (lengths,) = copy.glob("store/lengths/*/manifest.json")
    (sums,) = copy.glob("store/download/*/data/*.jsonl")
    documents = [json.loads(line)["text"] for line in sums.read_text().splitlines()]
    median = statistics.median(1 + len(gpt2_encoding().encode(document)) for document in documents)
    assert json.loads(lengths.read_text())["facts"] == {"stage": "lengths", "median": median}
    run(copy, "ruff", "check", ".")
    run(copy, "ruff", "format", "--check", ".")
    run(copy, "lint-imports")
