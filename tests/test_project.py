"""README, docs/, the Makefile and pyproject.toml agree with the code."""

import importlib.util
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from gpt2.config.recipe import load, load_runtime, parse_overrides

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_readme_s_tree_shows_every_package_and_shared_module() -> None:
    """Bug: a package that was added, moved or deleted, and the tree did not follow."""
    tree = re.search(r"^gpt2/ .*\n((?:  .*\n)+)", README, re.MULTILINE)
    assert tree is not None
    columns = re.findall(r"^  (?! )(.*?)(?:   |/ )", tree.group(1), re.MULTILINE)
    packages = {path.parent.name for path in (ROOT / "gpt2").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "gpt2").glob("*.py")} - {"__init__"}
    assert {name for column in columns for name in column.split()} == packages | modules


def test_files_named_in_documentation_exist() -> None:
    """Bug: a module that was renamed and that README or docs/ still name."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w-])(?:bench|conf|deploy|docker|docs|flows|gpt2|tasks|tests)/[\w./-]*\w", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_fits_a_reader_s_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > 120] == []


def test_constraints_pin_what_the_project_names() -> None:
    pinned = {
        re.split(r"[=<>]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in ("test", "cluster", "harness"):
        wanted += PROJECT["project"]["optional-dependencies"][extra]
    names = {re.split(r"[\[=<>~ ]", name)[0].lower().replace("_", "-") for name in wanted}
    assert names - {"reproduce-gpt2"} <= pinned


def commands() -> list[list[str]]:
    """The words of every command that README and docs/ show, as a shell reads them."""
    text = "\n".join([README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))])
    blocks = re.findall(r"^```\n(.*?)^```|^((?:    \S.*\n)+)", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in "".join(block).splitlines()]
    lines += re.findall(r"`((?:make|python -m) [^`]*)`", text)
    lines = [line for line in lines if line.startswith(("make ", "python ", "prefect "))]
    return [shlex.split(line.replace("<", "").replace(">", ""), comments=True) for line in lines]


def test_commands_of_documentation_name_what_exists() -> None:
    """Bugs: a target, a module, a deployment or a field that was renamed; an override that the shell takes apart."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    deployments = {each["name"] for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    programs = set()
    for words in commands():
        programs.add(words[0])
        if words[0] == "make":
            assert words[1] in targets, words
            given = dict(word.partition("=")[::2] for word in words[2:])
            if words[1] in ("reproduce", "plan", "baseline"):  # make hands ARGS to a shell
                overrides = parse_overrides(shlex.split(given.get("ARGS", "")))
                recipe = {key: value for key, value in overrides.items() if not key.startswith("runtime.")}
                load(given["CONF"], recipe)
                load_runtime(None, {key: value for key, value in overrides.items() if key not in recipe})
        elif words[0] == "python":
            for name in (words[i + 1] for i, word in enumerate(words) if word == "-m"):
                assert importlib.util.find_spec(name) is not None, name
        else:
            assert words[:3] == ["prefect", "deployment", "run"] and words[3].partition("/")[2] in deployments, words
    assert programs == {"make", "python", "prefect"}


PROMPT = '`touch pwned` $HOME $(x) $$ "q" it\'s; #'


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["sample", f"PROMPT={PROMPT}"], ["-m", "gpt2.generate", "a b", "--prompt", PROMPT]),
        (["export", "OUT=$HOME x"], ["-m", "gpt2.export", "a b", "$HOME x"]),
        (["export"], None),
        (
            ["sample", "MODEL=", "CONF=demo", "PROMPT=x", "ARGS=train.seed=7 --tokens 4"],
            ["-m", "gpt2.generate", "--prompt", "x", "--recipe", "demo", "train.seed=7", "--tokens", "4"],
        ),
        (
            ["export", "MODEL=", "CONF=demo", "OUT=x y", "ARGS=train.seed=7"],
            ["-m", "gpt2.export", "x y", "--recipe", "demo", "train.seed=7"],
        ),
    ],
    ids=["sample", "export", "nowhere", "recipe", "recipe-export"],
)
def test_make_takes_text_as_it_is(tmp_path: Path, words: list[str], wanted: list[str] | None) -> None:
    """Bugs: a prompt that is run as a command, or loses its dollars; an export to nowhere that says "exists: delete
    it" of the checkout."""
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >"{said}"\n')
    python.chmod(0o755)
    newest = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt"))
    (tmp_path / ".installed").touch()
    os.utime(tmp_path / ".installed", (newest + 1, newest + 1))
    environment = {name: value for name, value in os.environ.items() if name not in ("PROMPT", "OUT", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", "-s", f"BIN={tmp_path}", "EXTRAS=", "MODEL=a b", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if wanted is None:
        assert done.returncode == 2 and done.stderr.startswith("error: OUT is not given: make export OUT=folder\n")
        assert not said.exists()
    else:
        assert said.read_text().split("\0")[:-1] == wanted, done.stderr
    assert not (ROOT / "pwned").exists()
