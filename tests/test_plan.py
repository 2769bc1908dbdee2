"""Addresses: what changes them and, as important, what does not."""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import Field

from gpt2.architecture import hf_config
from gpt2.config.recipe import load, load_runtime
from gpt2.config.run import RunConfig
from gpt2.config.section import ADDED, Section
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.plan import Plan, plan, prepare
from gpt2.stage.file_hashes import Stamp, sha256_file
from gpt2.stage.manifest import Request, canonical


def planned(tmp_path: Path, recipe: str = "124m", **overrides: object) -> Plan:
    return plan(load(recipe, {key.replace("__", "."): value for key, value in overrides.items()}), tmp_path)


def test_the_learning_rate_reaches_training_and_what_follows_only(tmp_path: Path) -> None:
    """An address too wide tokenizes 10B tokens again for a learning rate; one too narrow reuses a stale model."""
    before = planned(tmp_path).requests()
    after = planned(tmp_path, train__optim__max_lr=1e-3).requests()
    changed = {name for name in before if before[name].address != after[name].address}
    assert changed == {"train", "evaluate", "report"}


def test_tokenization_reaches_everything_after_it(tmp_path: Path) -> None:
    before = planned(tmp_path).requests()
    after = planned(tmp_path, tokenize__shard_tokens=50_000_000).requests()
    changed = {name for name in before if before[name].address != after[name].address}
    assert changed == {"tokenize", "train", "evaluate", "report"}


def test_sizes_share_data_and_benchmark(tmp_path: Path) -> None:
    small, large = planned(tmp_path, "350m"), planned(tmp_path, "774m")
    assert small.tokenize.address == large.tokenize.address
    assert small.benchmarks["hellaswag"].address == large.benchmarks["hellaswag"].address
    assert small.train.address != large.train.address


def test_a_benchmark_for_the_end_does_not_train_again(tmp_path: Path) -> None:
    before = planned(tmp_path)
    after = planned(
        tmp_path, benchmarks__held_out={"kind": "continuation"}, evaluate__benchmarks=["hellaswag", "held_out"]
    )
    assert before.train.address == after.train.address
    assert before.evaluate.address != after.evaluate.address


def test_the_runtime_changes_no_address(tmp_path: Path) -> None:
    request = planned(tmp_path).train
    one = prepare(request, load_runtime(None, {"runtime.store": str(tmp_path), "runtime.gpus": 1}))
    eight = prepare(request, load_runtime(None, {"runtime.store": str(tmp_path), "runtime.gpus": 8}))
    assert one == eight == tmp_path / request.address
    assert json.loads((one / "runtime.json").read_text())["gpus"] == 8


def test_hints_are_not_part_of_the_address() -> None:
    here = Request(stage="download", version=1, config={"a": 1}, hints={"paths": ["/here"]})
    there = Request(stage="download", version=1, config={"a": 1}, hints={"paths": ["/there"]})
    assert here.address == there.address
    assert here.address != Request(stage="download", version=2, config={"a": 1}).address


class Inner(Section):
    old: int = 1
    new: Annotated[int | None, ADDED] = None


class Outer(Section):
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    named: dict[str, Inner] = {}
    added: Annotated[Inner, ADDED] = Inner()
    later: Annotated[dict[str, Inner], Field(description="x"), ADDED] = {}


def test_a_field_added_with_a_default_changes_no_address() -> None:
    """Bug: every new option, used or not, trained and tokenized all existing runs again."""
    one = Inner()
    assert Outer(several=(one,), named={"a": one}).identity() == {
        "inner": {"old": 1}, "several": [{"old": 1}], "named": {"a": {"old": 1}}
    }  # fmt: skip
    two = Inner(new=2)
    assert Outer(inner=two, several=(one, two), named={"a": two}, added=two, later={"b": two}).identity() == {
        "inner": {"old": 1, "new": 2},
        "several": [{"old": 1}, {"old": 1, "new": 2}],
        "named": {"a": {"old": 1, "new": 2}},
        "added": {"old": 1, "new": 2},
        "later": {"b": {"old": 1, "new": 2}},
    }
    left_out = Outer(several=(one,)).identity()
    assert Outer.model_validate(left_out) == Outer(several=(one,)), "a request is read back as it was planned"


ADDED_DEFAULTS: dict[str, object] = {"TokenizeConfig.max_document_bytes": None}
"""Section.field -> default, of every ADDED field: one line for each new one, never changed afterwards."""

REQUESTS = {
    "download": "0e3870fe8054f907",
    "tokenize": "4394a95d096f4870",
    "benchmark-hellaswag": "b9df616e302c6a06",
    "benchmark-held_out": "542baf8a19921935",
    "train": "67eadc27add27d6f",
    "evaluate": "4184942c2664c5c5",
    "report": "720d6a3e4439c334",
}
"""Stage -> hash of its section in `test_existing_addresses_stay`."""


def sections(annotation: Any) -> set[type[Section]]:
    """All sections that a value of this type may hold, at any depth."""
    found: set[type[Section]] = set()
    if isinstance(annotation, type) and issubclass(annotation, Section):
        found |= {annotation}
        for field in annotation.model_fields.values():
            found |= sections(field.annotation)
    for argument in get_args(annotation):
        found |= sections(argument)
    return found


def added_defaults(root: type[Section]) -> dict[str, object]:
    return {
        f"{section.__name__}.{name}": field.get_default(call_default_factory=True)
        for section in sections(root)
        for name, field in section.model_fields.items()
        if ADDED in field.metadata
    }


def test_the_default_of_an_added_field_never_changes() -> None:
    """It is not hashed: with another default, existing addresses would mean something that was never run."""
    assert added_defaults(Outer) == {"Inner.new": None, "Outer.added": Inner(), "Outer.later": {}}
    assert added_defaults(RunConfig) == ADDED_DEFAULTS
    assert len(sections(RunConfig)) > 20


def test_existing_addresses_stay(tmp_path: Path) -> None:
    """A changed hash here means that every store misses: mark a new field `ADDED`, and give an old one that changes
    its default another address on purpose, by changing the hash here."""
    hub = {"kind": "hub", "repo": "a/b", "revision": "0" * 40, "files": ["*.parquet"]}
    config = RunConfig.model_validate(
        {
            "name": "pinned",
            "download": {"source": hub},
            "benchmarks": {"hellaswag": {"kind": "hellaswag", "source": hub}, "held_out": {"kind": "continuation"}},
            "train": {
                "model": {"n_layer": 2, "n_head": 2, "n_embd": 16},
                "optim": {"max_lr": 1e-3},
                "max_steps": 1000,
                "benchmark": "hellaswag",
            },
            "evaluate": {"benchmarks": ["hellaswag", "held_out"]},
            "report": {"title": "t", "published": [{"name": "n", "source": "s", "val_loss": 3.0}]},
        }
    )
    requests = plan(config, tmp_path).requests()
    hashes = {
        name: hashlib.sha256(canonical(request.config).encode()).hexdigest()[:16] for name, request in requests.items()
    }
    assert hashes == REQUESTS
    assert (
        Request(stage="train", version=1, config={"a": [1, 2.5, None]}, inputs={"b": "c/d"}).address
        == "train/ce2abdcf135a5961"
    )


def test_an_address_is_the_same_in_every_process(tmp_path: Path) -> None:
    """A hash that depends on PYTHONHASHSEED would never hit."""
    command = [sys.executable, "-m", "gpt2.plan", "124m", f"runtime.store={tmp_path}"]
    listings = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(listings) == 1
    listing = listings.pop()
    assert planned(tmp_path).train.address in listing
    assert not any(tmp_path.glob("train/*")), "listing a plan writes nothing into it"


def test_write_makes_directories_that_a_stage_can_start_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpt2.plan", "124m", "--write", f"runtime.store={tmp_path}"]
    subprocess.run(command, capture_output=True, check=True)
    request = planned(tmp_path).tokenize
    written = Request.model_validate_json((tmp_path / request.address / "request.json").read_bytes())
    assert written.address == request.address


GPT2_124M = ModelConfig(n_layer=12, n_head=12, n_embd=768)


def hf_folder(tmp_path: Path, **fields: object) -> Path:
    """A Hugging Face folder of GPT-2 124M, but for `fields` of config.json; nothing reads its weights here."""
    folder = tmp_path / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(GPT2_124M) | fields))
    (folder / "model.safetensors").write_bytes(b"one")
    return folder


def llmc_file(tmp_path: Path, config: ModelConfig) -> Path:
    path = tmp_path / "model.bin"
    sizes = config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.padded_vocab_size
    path.write_bytes(struct.pack("<8i", 20240326, 3, *sizes).ljust(1024, b"\0"))
    return path


def test_other_weights_to_begin_from_are_another_training(tmp_path: Path) -> None:
    """Hashing only the path would silently reuse a model that began from what lay there before."""
    folder = hf_folder(tmp_path)
    first = planned(tmp_path, train__init_from=str(folder))
    pinned = first.train.config["init_sha256"]
    (folder / "model.safetensors").write_bytes(b"two")
    second = planned(tmp_path, train__init_from=str(folder))
    assert first.train.address != second.train.address
    with pytest.raises(UserError, match=r"train\.init_sha256 says"):
        planned(tmp_path, train__init_from=str(folder), train__init_sha256=pinned)


@pytest.mark.parametrize("change", [{"n_head": 6}, {"n_layer": 11}, {"block_size": 512}, {"vocab_size": 50304}])
def test_init_from_of_another_architecture_is_refused_when_planned(tmp_path: Path, change: dict[str, int]) -> None:
    """Catches: weights of 6 heads trained as 12, whose shapes are the same; a wrong shape found after tokenization."""
    other = GPT2_124M.model_copy(update=change)
    theirs = {key: value for key, value in hf_config(other).items() if key.startswith(("n_", "vocab"))}
    (name, number), ours = *change.items(), GPT2_124M.model_dump()
    for place in (hf_folder(tmp_path, **theirs), llmc_file(tmp_path, other)):
        with pytest.raises(UserError) as caught:
            planned(tmp_path, train__init_from=str(place))
        assert f"{name} {number} there and {ours[name]} here" in str(caught.value)
        assert f"train.model.{name}={number}" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("n_inner", 1024),
        ("n_head", 0),
        ("model_type", "gpt_neo"),
    ],
)
def test_init_from_that_computes_otherwise_is_refused_when_planned(tmp_path: Path, field: str, value: object) -> None:
    """Catches: a variant of GPT-2 with the same tensors trained on as if it were GPT-2."""
    with pytest.raises(UserError, match=rf"config\.json.*{field if field != 'model_type' else value}"):
        planned(tmp_path, train__init_from=str(hf_folder(tmp_path, **{field: value})))


def test_init_from_of_the_same_architecture_is_planned(tmp_path: Path) -> None:
    for place in (hf_folder(tmp_path), llmc_file(tmp_path, GPT2_124M)):
        assert planned(tmp_path, train__init_from=str(place)).train.config["init_sha256"]


def test_verify_hashes_what_is_remembered(tmp_path: Path) -> None:
    """Catches: runtime.verify=true that plans with a remembered hash, and so with the address of other text."""
    (text := tmp_path / "a.txt").write_text("text")
    source = {"kind": "local", "paths": [str(text)]}
    config = load("124m", {"download.source": source})
    stamp = Stamp.of(text)._asdict()
    (tmp_path / "hashes.json").write_text(json.dumps({str(text.resolve()): {**stamp, "sha256": "0" * 64}}))
    remembered, verified = plan(config, tmp_path), plan(config, tmp_path, verify=True)
    assert remembered.download.config["source"]["files"] == [["a.txt", 4, "0" * 64]]
    assert verified.download.config["source"]["files"] == [["a.txt", 4, sha256_file(text)]]
