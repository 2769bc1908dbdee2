"""The corpus that every Python installation has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gpt2 import installed_docs
from gpt2.installed_docs import LONGEST, SHORTEST, Document, documents, is_prose, prose, without_markup

pytestmark = pytest.mark.slow  # the whole installation is read

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made() -> list[Document]:
    return documents()


def test_there_is_enough_and_it_is_quick() -> None:
    """Catches: a corpus too small to show learning, or a demo that waits for it."""
    began = time.monotonic()
    made = documents()
    assert time.monotonic() - began < 30  # 2 to 3 s on an idle core
    assert sum(len(document.text.encode()) for document in made) > 1_500_000


def test_kinds_are_spread(made: list[Document]) -> None:
    """Catches: a validation shard of one kind of text and a training set of the others."""
    whole = Counter(document.kind for document in made)
    assert set(whole) == {"topics", "docstrings", "descriptions"}
    first = Counter(document.kind for document in made[: len(made) // 5])
    for kind, count in whole.items():
        assert 0.3 * count / 5 < first[kind] < 3 * count / 5, (kind, first, whole)


def test_documents_are_long_enough_and_nothing_comes_twice(made: list[Document]) -> None:
    """Catches: a corpus of fragments; validation text that was trained on."""
    assert min(len(document.text) for document in made) >= SHORTEST - 2
    assert sorted(len(document.text) for document in made)[-len(made) // 50] < 1.5 * LONGEST
    paragraphs = Counter(paragraph for document in made for paragraph in document.text.split("\n\n"))
    assert paragraphs.most_common(1)[0][1] == 1


def test_same_installation_same_bytes(tmp_path: Path) -> None:
    """Catches: an order that follows the hash seed or the file system, so that addresses lie."""
    program = (
        "from pathlib import Path; import sys; from gpt2.installed_docs import *;"
        "print(write(Path(sys.argv[1]), max_bytes=400_000), installation().sha256)"
    )
    outputs = []
    for seed in ("1", "2"):
        env = dict(os.environ) | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program, str(tmp_path / seed)]
        outputs.append(subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_parquet_has_a_text_column_and_keeps_to_max_bytes(tmp_path: Path, made: list[Document]) -> None:
    """Catches: a file that the tokenizer cannot read; a limit that cuts a document or is passed."""
    path = tmp_path / "docs.parquet"
    size = installed_docs.write(path, max_bytes=100_000)
    texts = pq.read_table(path).column("text").to_pylist()
    assert texts == [document.text for document in made[: len(texts)]]
    assert size == sum(len(text.encode()) for text in texts) <= 100_000
    assert size + len(made[len(texts)].text.encode()) > 100_000


def test_a_bare_installation_is_enough(tmp_path: Path) -> None:
    """Catches: leaning on packages that a fresh virtual environment does not have."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    program = "from gpt2.installed_docs import *; print(sum(len(d.text.encode()) for d in documents()))"
    command = [str(tmp_path / "bare" / "bin" / "python"), "-c", program]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    out = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(out) > 1_000_000


def test_modules_are_parsed_not_imported() -> None:
    """Catches: importing the whole standard library: `this` prints, antigravity opens a browser."""
    program = "import sys; from gpt2.installed_docs import *; documents(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    for name in ("this", "antigravity", "turtle", "pydoc_data.topics"):
        assert f"'{name}'" not in done.stdout


def test_our_own_readme_is_left_out(made: list[Document]) -> None:
    """Catches: an edit of the README that changes the demo's corpus and all addresses after it."""
    assert not any("reproduce-gpt2" in document.origin for document in made)


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


def test_markup_is_taken_off() -> None:
    """Catches: badges, tags, addresses and fences in the corpus."""
    text = """<p align="center"><img src="x.png"></p>
[![Build](https://a.org/b.svg)](https://a.org) ![logo](logo.png)

# Heading

This is a **fast** [tool](https://a.org/x) that is `small`, see [the docs][1] at https://b.org/c for more of it.

```python
the code of this is not in the text and it has to go
```

.. note:: a directive
   with the text of it

Use :class:`~a.B` and `the site <https://c.org>`_ as you like it.

[1]: https://a.org/docs
<!-- the comment is not a part of the text -->
"""
    assert prose(without_markup(text)) == [
        "This is a fast tool that is small, see the docs at for more of it.",
        "Use a.B and the site as you like it.",
    ]
