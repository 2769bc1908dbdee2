"""The project's picture of itself is true."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def modules() -> set[str]:
    found = {path.stem for path in (ROOT / "gpt2").glob("*.py")} - {"__init__"}
    return found | {path.parent.name for path in (ROOT / "gpt2").glob("*/__init__.py")}


def test_readme_s_tree_shows_every_module_and_no_other() -> None:
    tree = re.search(r"```\n(conf/ .*?)```", README, re.DOTALL)
    assert tree is not None
    library = tree.group(1).split("gpt2/ ")[1].split("\ntasks/")[0]
    named = set()
    for line in library.splitlines()[1:]:
        if line.startswith("    "):
            named |= set(re.split(r" {2,}", line.strip())[0].replace("/", "").split())
    assert named - {"bpe.c"} == modules()


def test_every_module_has_its_layer() -> None:
    """A module that no contract names could import anything."""
    contracts = {contract["name"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}
    values = set(contracts["values: pydantic only"]["source_modules"])
    data = set(contracts["data: never torch"]["source_modules"])
    assert not values & data
    tree = README.split("  torch\n")[1].split("\ntasks/")[0]
    torch = {
        f"gpt2.{name.strip('/')}" for line in tree.splitlines() for name in re.split(r" {2,}", line.strip())[0].split()
    }
    assert values | data | torch == {f"gpt2.{name}" for name in modules()}


def test_every_package_is_installed() -> None:
    """A package left out of the list works in a checkout and fails once installed."""
    packages = {".".join(path.parent.relative_to(ROOT).parts) for top in ("gpt2", "tasks", "flows")
                for path in (ROOT / top).rglob("__init__.py")}  # fmt: skip
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


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
