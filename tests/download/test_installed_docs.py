"""The corpus of the demo."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from paths import ROOT

from gpt2.download import installed_docs
from gpt2.download.installed_docs import (
    DISTRIBUTIONS,
    LONGEST,
    SHORTEST,
    CorpusDocument,
    SourceFile,
    documents,
    is_prose,
    prose,
)
from gpt2.errors import UserError

pytestmark = pytest.mark.slow  # the whole corpus is read


@pytest.fixture(scope="module")
def made() -> list[CorpusDocument]:
    return documents()


def test_there_is_enough_and_it_is_quick() -> None:
    """Catches: a corpus too small to show learning, or a demo that waits for it."""
    began = time.process_time()
    made = documents()
    assert time.process_time() - began < 30  # 3 to 4 s; other processes do not count
    assert sum(len(document.text.encode()) for document in made) > 2_000_000


def test_packages_are_spread(made: list[CorpusDocument]) -> None:
    """Catches: a validation shard of one package's text and a training set of the other's."""
    whole = Counter(re.split("[.,]", document.origin)[0] for document in made)
    assert set(whole) == set(DISTRIBUTIONS)
    first = Counter(re.split("[.,]", document.origin)[0] for document in made[: len(made) // 5])
    for name, count in whole.items():
        assert 0.3 * count / 5 < first[name] < 3 * count / 5, (name, first, whole)


def test_the_corpus_is_of_packages_that_are_pinned_exactly() -> None:
    """Catches: a corpus that depends on the day of the installation."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in DISTRIBUTIONS:
        assert f"{name}=={importlib.metadata.version(name)}" in dependencies


def test_documents_are_long_enough_and_nothing_comes_twice(made: list[CorpusDocument]) -> None:
    """Catches: a corpus of fragments; validation text that was trained on."""
    assert min(len(document.text) for document in made) >= SHORTEST - 2
    assert sorted(len(document.text) for document in made)[-len(made) // 50] < 1.5 * LONGEST
    paragraphs = Counter(paragraph for document in made for paragraph in document.text.split("\n\n"))
    assert paragraphs.most_common(1)[0][1] == 1


def test_same_installation_same_bytes(tmp_path: Path) -> None:
    """Catches: an order that follows the hash seed or the file system, so that addresses lie."""
    program = (
        "from pathlib import Path; import sys; from gpt2.download.installed_docs import *;"
        "print(write(Path(sys.argv[1]), max_bytes=400_000), installation().sha256)"
    )
    outputs = []
    for seed in ("1", "2"):
        env = dict(os.environ) | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program, str(tmp_path / seed)]
        outputs.append(subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_parquet_has_a_text_column_and_keeps_to_max_bytes(tmp_path: Path, made: list[CorpusDocument]) -> None:
    """Catches: a file that the tokenizer cannot read; a limit that cuts a document or is passed."""
    path = tmp_path / "docs.parquet"
    size = installed_docs.write(path, max_bytes=100_000)
    texts = pq.read_table(path).column("text").to_pylist()
    assert texts == [document.text for document in made[: len(texts)]]
    assert size == sum(len(text.encode()) for text in texts) <= 100_000
    assert size + len(made[len(texts)].text.encode()) > 100_000


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_python_gives_the_same_corpus(version: str, made: list[CorpusDocument]) -> None:
    """Catches: docstrings that one Python cleans in another way than the next, at one address."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    program = (
        "import hashlib, sys; sys.path.append(sys.argv[1]); from gpt2.download.installed_docs import documents;"
        "print(hashlib.sha256(repr([(d.origin, d.text) for d in documents()]).encode()).hexdigest())"
    )
    packages = str(importlib.metadata.distribution("mlflow").locate_file(""))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, "-c", program, packages], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = hashlib.sha256(repr([(d.origin, d.text) for d in made]).encode()).hexdigest()
    assert done.stdout.strip() == expected


def test_a_changed_source_file_is_an_error(tmp_path: Path) -> None:
    """Catches: text that differs from what the address says."""
    path = tmp_path / "module.py"
    path.write_text('"""A docstring that is not the one of the wheel."""')
    with pytest.raises(UserError, match=r"module\.py has sha256 .*, its wheel AAAA"):
        SourceFile("package/module.py", path, "AAAA").parse()


def test_modules_are_parsed_not_imported() -> None:
    """Catches: importing two large packages, with what they start."""
    program = "import sys; from gpt2.download.installed_docs import *; documents(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    for name in ("mlflow", "prefect", "prefect.main"):
        assert f"'{name}'" not in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "The with statement is used to wrap the execution of a block with methods defined by a context manager.",
        "Queue.put: Put an item into the queue.",
        "It's a “quoted” remark – something with dashes, with (brackets) and with 3 numbers.",
    ],
)
def test_sentences_are_prose(line: str) -> None:
    """Catches: a filter so strict that little is left."""
    assert is_prose(line)


@pytest.mark.parametrize(
    "line",
    [
        ">>> the value of x is in the list and it is of a type",
        'with_stmt ::= "with" ( "(" with_stmt_contents ","? ")" | with_stmt_contents ) ":" suite',
        "for key, value in sorted(items.items()): self.data[key] = value + [1, 2, 3]",
        "+------+-------+ | a | the | of | is | in | +------+-------+",
        "Short line.",
        "Copyright Holders Names Company Limited Incorporated Region",
        "它是一个用于构建数据管道的工作流编排框架",
    ],
)
def test_code_and_tables_are_not_prose(line: str) -> None:
    """Catches: a model that learns grammars, tables and doctests."""
    assert not is_prose(line)


def test_paragraphs_are_unwrapped_and_lists_taken_apart() -> None:
    """Catches: hard line breaks in the middle of sentences, lists run together, headings glued to what follows."""
    text = """
    A heading
    *********

    The first paragraph is wrapped
    at a narrow column.

    1. The first item of the list
       goes on in the next line.
    2. The second item is in the list too.

       code = [1, 2, 3]
    """
    assert prose(text) == [
        "The first paragraph is wrapped at a narrow column.",
        "The first item of the list goes on in the next line.",
        "The second item is in the list too.",
    ]
