"""Validation of configurations, and the published recipes."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gpt2.config import strict_yaml
from gpt2.config.recipe import CONF, load, load_runtime, names, parse_overrides
from gpt2.config.train import ModelConfig, OptimConfig, TrainConfig
from gpt2.errors import UserError, without_credentials

PUBLISHED_PARAMETERS = {"124m": 124_439_808, "350m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}


@pytest.mark.parametrize(("recipe", "parameters"), PUBLISHED_PARAMETERS.items())
def test_sizes_are_the_published_ones(recipe: str, parameters: int) -> None:
    assert load(recipe).train.model.n_params() == parameters


@pytest.mark.parametrize(
    ("recipe", "steps", "batch", "max_lr", "min_lr"),
    [
        ("124m", 19_560, 524_288, 6e-4, 0.0),
        ("350m", 60_000, 524_288, 3e-4, 0.0),
        ("774m", 286_102, 524_288, 2.5e-4, 0.0),
        ("1558m", 32_000, 1_048_576, 6e-4, 6e-5),
    ],
)
def test_recipes_are_llm_c_s(recipe: str, steps: int, batch: int, max_lr: float, min_lr: float) -> None:
    """A recipe that drifted from llm.c's would still train, and compare with nothing."""
    train = load(recipe).train
    assert (train.max_steps, train.total_batch_size) == (steps, batch)
    assert (train.optim.max_lr, train.optim.min_lr, train.optim.warmup_steps) == (max_lr, min_lr, 700)
    assert (train.optim.betas, train.optim.eps, train.optim.weight_decay, train.optim.grad_clip) == (
        (0.9, 0.95), 1e-8, 0.1, 1.0,
    )  # fmt: skip
    assert (train.val.every, train.benchmark_every, train.sample.every, train.checkpoint.every) == (
        250, 250, 20_000, 5_000,
    )  # fmt: skip
    assert (train.seed, train.model.block_size, train.model.vocab_size) == (42, 1024, 50257)


def test_every_recipe_in_conf_is_valid() -> None:
    assert {"124m", "350m", "774m", "1558m", "demo"} <= set(names())
    for name in names():
        assert load(name).name == name


@pytest.mark.parametrize(
    ("override", "path", "hint"),
    [
        ({"train.optim.max_lrr": 1}, "train.optim.max_lrr", "did you mean 'max_lr'?"),
        ({"trian.max_steps": 1}, "trian", "did you mean 'train'?"),
        ({"download.source.revison": "x"}, "download.source.revison", "did you mean 'revision'?"),
        ({"benchmarks.hellaswag.limt": 3}, "benchmarks.hellaswag.limt", "did you mean 'limit'?"),
        ({"benchmarks.hellaswag.source.revison": "x"}, "benchmarks.hellaswag.source.revison", "'revision'"),
        ({"train.optim.max_lr": -1}, "train.optim.max_lr", "greater than 0"),
        ({"train.optim.max_lr": "fast"}, "train.optim.max_lr", "'fast'"),
        ({"train.total_batch_size": 1000}, "train", "not a multiple of block_size 1,024: use 1,024"),
        ({"train.model.n_head": 7}, "train.model", "n_embd 768 is not a multiple of n_head 7"),
        ({"train.max_steps": 700}, "train", "warmup_steps 700 does not end before max_steps 700"),
        ({"evaluate.benchmarks": ["boolq"]}, "evaluate.benchmarks", "'hellaswag'"),
        ({"download.source.revision": "main"}, "download.source.revision", "pattern"),
    ],
)
def test_a_wrong_field_is_named_with_its_path(override: dict[str, object], path: str, hint: str) -> None:
    """A typo that is silently ignored trains the wrong thing for an hour."""
    with pytest.raises(UserError) as caught:
        load("124m", override)
    assert path in str(caught.value)
    assert hint in str(caught.value)
    assert ".hub." not in str(caught.value), "pydantic's union tags are not part of what the user wrote"


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"no recipe '125m': conf/ has .*124m"):
        load("125m")


def test_overrides_keep_the_rest_of_the_section() -> None:
    """Replacing the whole section would silently fall back to other defaults."""
    config = load("350m", parse_overrides(["train.optim.max_lr=3e-4", "train.model.block_size=512"]))
    assert config.train.optim.max_lr == 3e-4
    assert config.train.optim.warmup_steps == 700
    assert config.train.model.n_layer == 24


def test_runtime_overrides_are_apart_from_the_recipe() -> None:
    overrides = parse_overrides(["runtime.gpus=2", "runtime.micro_batch_size=auto", "train.max_steps=800"])
    runtime = load_runtime(None, overrides)
    assert (runtime.gpus, runtime.micro_batch_size) == (2, "auto")
    assert runtime.store.is_absolute()
    assert load("124m", overrides).train.max_steps == 800
    with pytest.raises(UserError, match=r"runtime: gpu: no such field; did you mean 'gpus'\?"):
        load_runtime(None, {"runtime.gpu": 1})


@pytest.mark.parametrize("argument", ["train.max_steps", "=3"])
def test_an_override_without_equals_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match="write field=value"):
        parse_overrides([argument])


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        load("demo").train.max_steps = 3  # type: ignore[misc]


def test_min_lr_above_max_lr_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"min_lr 0\.1 is above max_lr 0\.01"):
        OptimConfig(max_lr=0.01, min_lr=0.1)


def test_the_vocabulary_is_padded_to_a_multiple_of_128() -> None:
    model = ModelConfig(n_layer=12, n_head=12, n_embd=768)
    assert model.padded_vocab_size == 50_304
    train = TrainConfig(model=model, optim=OptimConfig(max_lr=6e-4), max_steps=1000)
    assert train.sequences_per_step == 512


@pytest.mark.parametrize("value", ["010", "1:30", "0x10", "1_000", "true", '"1"', "2026-01-01", "1.0", "1e1", "null"])
def test_what_only_resembles_an_integer_is_refused(value: str) -> None:
    """Bug: as YAML 1.1 has it, 010 is 8 and 1:30 is 90; and true counts as 1."""
    with pytest.raises(UserError, match=r"train\.seed: "):
        load("124m", parse_overrides([f"train.seed={value}"]))


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "y", "1", "0", '"true"'])
def test_only_true_and_false_are_booleans(value: str) -> None:
    with pytest.raises(UserError, match=r"train\.shuffle: "):
        load("124m", parse_overrides([f"train.shuffle={value}"]))


@pytest.mark.parametrize("value", ["1e-4", "1.0e-4", "1E-4", "0.0001", ".0001"])
def test_a_number_with_an_exponent_is_a_number(value: str) -> None:
    """Bug: YAML 1.1 reads 1e-4 as text."""
    assert parse_overrides([f"a={value}"]) == {"a": 1e-4}
    assert load("124m", parse_overrides([f"train.optim.max_lr={value}"])).train.optim.max_lr == 1e-4


def _numbers(tree: dict[str, Any], path: str = "") -> list[str]:
    fields = []
    for key, value in tree.items():
        if isinstance(value, dict):
            fields += _numbers(value, f"{path}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            fields.append(f"{path}{key}")
    return fields


def test_no_numeric_field_accepts_a_boolean_or_text() -> None:
    """Bug: true was accepted as 1; through Prefect, overrides arrive as JSON and pass no YAML reader."""
    fields = _numbers(load("124m").model_dump())
    assert len(fields) > 30
    for field in fields:
        for value in (True, "3"):
            with pytest.raises(UserError, match=re.escape(field)):
                load("124m", {field: value})
    for field in _numbers(load_runtime().model_dump()):
        with pytest.raises(UserError, match=field):
            load_runtime(None, {f"runtime.{field}": True})


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    """Bug: the last one wins, so the learning rate that is read is not the one that is used."""
    text = (CONF / "124m.yaml").read_text()
    path = tmp_path / "twice.yaml"
    path.write_text(text.replace("train:\n", "train:\n  seed: 1\n  seed: 2\n"))
    with pytest.raises(UserError, match=r"'seed' is given twice.*line \d+"):
        load(str(path))
    with pytest.raises(UserError, match=r"train\.seed is given twice"):
        parse_overrides(["train.seed=1", "train.seed=2"])


def test_the_runtime_s_file_is_read_as_strictly(tmp_path: Path) -> None:
    path = tmp_path / "runtime.yaml"
    path.write_text("gpus: 010\n")
    with pytest.raises(UserError, match="gpus"):
        load_runtime(str(path))
    path.write_text("gpus: 1\ngpus: 2\n")
    with pytest.raises(UserError, match="twice"):
        load_runtime(str(path))


def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 10_000)
    (tmp_path / "circle.yaml").write_text("a: &x [*x]")
    (tmp_path / "tag.yaml").write_text("a: !!timestamp 2026-99-99")
    names = ["folder.yaml", "latin.yaml", "deep.yaml", "circle.yaml", "tag.yaml", "folder.yaml/inside.yaml"]
    for recipe in [*(str(tmp_path / name) for name in names), "a" * 5_000, "nul\0"]:
        for read in (load, load_runtime):
            with pytest.raises(UserError) as caught:
                read(recipe)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 3_000


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=2026-99-99",
        "train.seed=" + "9" * 5_000,
        "train.seed=" + "[" * 5_000,
        "train.seed=" + "[" * 300 + "]" * 300,
        ".".join("a" * 5_000) + "=1",
        'report.title="\\ud800"',
        'train.init_from="\\0"',
        'runtime.store="\\0"',
        "runtime.store=~no-such-user/store",
        f"train.seed={2**63}",
        f"train.seed={-(2**63) - 1}",
        f"train.model.n_layer={10**9}",
        f"train.model.n_embd={12 * 10**9}",
        f"train.model.block_size={2**40}",
        f"train.model.vocab_size={2**16 + 1}",
        f"train.max_steps={10**18}",
        f"train.total_batch_size={2**40}",
        f"train.val.tokens={10**30}",
        f"train.sample.tokens={10**30}",
        f"tokenize.shard_tokens={2**31}",
        f"evaluate.val_tokens={2**63}",
        f"runtime.processes={10**9}",
    ],
)
def test_a_value_that_nothing_can_hold_is_refused_before_anything_runs(override: str) -> None:
    """Bug: a traceback, or an overflow that is found only after hours of tokenization."""
    with pytest.raises(UserError) as caught:
        overrides = parse_overrides([override])
        load("124m", overrides)
        load_runtime(None, overrides)
    assert "\n" not in str(caught.value)


def test_a_message_shortens_a_long_value() -> None:
    """Bug: 100,000 characters of a value fill the terminal, and hide what is wrong with it."""
    with pytest.raises(UserError) as caught:
        load("124m", {"train.optim.max_lr": "x" * 100_000})
    assert "train.optim.max_lr: " in str(caught.value) and len(str(caught.value)) < 500
    message = str(UserError("begin" + "x" * 100_000 + "end"))
    assert message.startswith("begin") and message.endswith("end") and len(message) < 3_000


@pytest.mark.parametrize(
    "value", ["yes", "010", "1:30", "1e-4", "1E5", "~", "", "2026-01-01", "=", "a\0b", 1e-5, 6e-4, 1]
)
def test_what_is_written_is_read_as_the_same(value: object) -> None:
    """Bug: a report's configuration writes the text 1e-4 without quotes, which is then read as a number."""
    assert strict_yaml.load(strict_yaml.dump({"a": [value]})) == {"a": [value]}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://ann:secret@host:5000/x", "http://host:5000/x"),
        ("http://secret@host:5000", "http://host:5000"),
        ("postgresql+psycopg2://ann:se/c#r?e@t@host/db", "postgresql+psycopg2://host/db"),
        ("s3://key:se/cret@host/b", "s3://host/b"),
        (
            "https://host/a?token=secret&b=1&X-Amz-Signature=secret#f",
            "https://host/a?token=***&b=1&X-Amz-Signature=***#f",
        ),
        ("tcp://host:8786 and tls://ann:secret@other:1", "tcp://host:8786 and tls://other:1"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("https://huggingface.co/a/b/tree/main?recursive=True&expand=False",) * 2,
        ("sqlite:////home/ann@work/mlflow.db",) * 2,
        ("ann@host: no address",) * 2,
        ('{"a":"http://host","b":"ann@host"}',) * 2,
    ],
)
def test_an_address_is_shown_without_its_credentials(given: str, shown: str) -> None:
    """Bug: user:password of MLFLOW_TRACKING_URI, HF_ENDPOINT and others stands in messages, links and logs."""
    assert without_credentials(given) == shown
    assert str(UserError(given)) == shown
