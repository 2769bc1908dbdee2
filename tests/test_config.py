"""The configuration refuses what is wrong, in the user's own terms, and carries the published recipes."""

import pytest
from pydantic import ValidationError

from gpt2.config import ModelConfig, OptimConfig, TrainConfig
from gpt2.errors import UserError
from gpt2.recipe import load, load_runtime, names, parse_overrides

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
def test_a_mistake_is_named_with_its_path(override: dict[str, object], path: str, hint: str) -> None:
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


def test_padded_vocabulary() -> None:
    model = ModelConfig(n_layer=12, n_head=12, n_embd=768)
    assert model.padded_vocab_size == 50_304
    train = TrainConfig(model=model, optim=OptimConfig(max_lr=6e-4), max_steps=1000)
    assert train.sequences_per_step == 512
