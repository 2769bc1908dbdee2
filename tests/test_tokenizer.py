"""gpt2.tokenizer: the source of the vocabulary, and token ids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.machine import user_cache
from gpt2.tokenizer import CACHE_VARIABLES, EOT, FILES, VOCAB_SIZE, gpt2_encoding

LOAD = "from gpt2.tokenizer import gpt2_encoding; print(gpt2_encoding().encode_ordinary('Hello, world'))"


def load(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Load the encoding in a fresh process whose home is `home` and from which no address can be reached."""
    environment = {k: v for k, v in os.environ.items() if k not in (*CACHE_VARIABLES, "XDG_CACHE_HOME")}
    environment |= {
        "HOME": str(home),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    } | variables
    return subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True)


def test_ids_are_those_of_the_gpt2_encoding() -> None:
    """Catches another encoding (r50k, p50k, ...) under the same name, or another number for end of text."""
    encoding = gpt2_encoding()
    assert encoding.encode_ordinary("Hello, world") == [15496, 11, 995]
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [EOT] == [encoding.eot_token]
    assert encoding.n_vocab == VOCAB_SIZE


def test_no_network_and_empty_home(tmp_path: Path) -> None:
    """Catches needing a network, or importing the distribution that carries the files."""
    done = load(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[15496, 11, 995]"), done.stderr
    cached = tmp_path / ".cache/reproduce-gpt2/tiktoken"
    assert {path.name for path in cached.iterdir()} == {name for name, _ in FILES.values()}


def test_a_damaged_cache_is_repaired_without_a_network(tmp_path: Path) -> None:
    """tiktoken deletes a file with a wrong hash and fetches it; without a network that must not be the end."""
    cached = tmp_path / ".cache/reproduce-gpt2/tiktoken"
    cached.mkdir(parents=True)
    for name, _ in FILES.values():
        (cached / name).write_bytes(b"cut off")
    done = load(tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable", CACHE_VARIABLES)
def test_a_folder_the_user_set_is_used(tmp_path: Path, variable: str) -> None:
    """Catches overriding the user's own cache folder."""
    done = load(tmp_path, **{variable: str(tmp_path / "theirs")})
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "theirs").iterdir())) == 2
    assert not (tmp_path / ".cache").exists()


def test_environment_is_left_as_it_was() -> None:
    """Catches a cache folder of ours leaking into everything else that runs in this process."""
    before = dict(os.environ)
    gpt2_encoding.cache_clear()
    gpt2_encoding()
    assert dict(os.environ) == before


def test_missing_files_are_reported_in_one_line(tmp_path: Path) -> None:
    """Catches a traceback from requests' depths where the distribution is missing and nothing can be fetched."""
    code = "import gpt2.tokenizer as t; t.DISTRIBUTION = 'not-installed'\ntry: t.gpt2_encoding()\n" \
        "except t.UserError as e: print(e)"  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in (*CACHE_VARIABLES, "XDG_CACHE_HOME")}
    environment |= {"HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "install the distribution not-installed" in done.stdout, done.stderr


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches failing where the home is not a folder, as in some containers."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = user_cache("anything")
    assert folder.is_dir() and tmp_path not in folder.parents
