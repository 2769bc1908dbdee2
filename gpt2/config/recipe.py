"""Reads conf/<name>.yaml with overrides; errors name the field as the user wrote it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from gpt2.config import strict_yaml
from gpt2.config.run import RunConfig
from gpt2.config.runtime import Runtime
from gpt2.errors import UserError, describe, shorten

CONF = Path(__file__).parents[2] / "conf"
RUNTIME_PREFIX = "runtime."
M = TypeVar("M", bound=BaseModel)


def names() -> list[str]:
    """Names of the recipes in conf/."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def load(recipe: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a recipe by name ("124m") or path, apply dotted overrides and validate it.

    Args:
        overrides: e.g. {"train.optim.max_lr": 3e-4}; keys that begin with `runtime.` are ignored, see `load_runtime`.

    Raises:
        UserError: no such recipe, invalid YAML, or an unknown or invalid field, with its path.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else CONF / f"{recipe}.yaml"
    tree = _read_yaml(path, f"there is no recipe {recipe!r}: conf/ has {', '.join(names())}")
    relevant = {key: value for key, value in (overrides or {}).items() if not key.startswith(RUNTIME_PREFIX)}
    return _validate(RunConfig, _merge(tree, relevant), path.name)


def load_runtime(runtime: str | None = None, overrides: Mapping[str, Any] | None = None) -> Runtime:
    """Read conf/runtime/<name>.yaml (None: defaults only) and apply the overrides with the prefix `runtime.`."""
    tree: dict[str, Any] = {}
    if runtime is not None:
        path = Path(runtime) if runtime.endswith((".yaml", ".yml")) else CONF / "runtime" / f"{runtime}.yaml"
        known = ", ".join(sorted(p.stem for p in (CONF / "runtime").glob("*.yaml")))
        tree = _read_yaml(path, f"there is no runtime {runtime!r}: conf/runtime/ has {known}")
    prefix = len(RUNTIME_PREFIX)
    relevant = {key[prefix:]: value for key, value in (overrides or {}).items() if key.startswith(RUNTIME_PREFIX)}
    return _validate(Runtime, _merge(tree, relevant), "runtime")


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """["train.optim.max_lr=3e-4", "runtime.gpus=2"] -> {"train.optim.max_lr": 0.0003, "runtime.gpus": 2}; the values
    are YAML.

    Raises:
        UserError: an argument without "=", a repeated field, or invalid YAML.
    """
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UserError(
                f"{shorten(argument)!r} is not an override: write field=value, as in train.optim.max_lr=3e-4"
            )
        if key in overrides:
            raise UserError(f"{key} is given twice: remove one")
        try:
            overrides[key] = strict_yaml.load(value)
        except ValueError as error:
            raise UserError(f"the value of {shorten(argument)!r} cannot be read as YAML: {error}") from error
    return overrides


def _read_yaml(path: Path, missing: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(missing) from None
    except OSError as error:
        raise UserError(describe(error)) from error
    except ValueError as error:  # not UTF-8, or a path that no file can have
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error
    try:
        tree = strict_yaml.load(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no sections")
    return tree


def _merge(tree: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for dotted, value in overrides.items():
        *sections, field = dotted.split(".")
        node = merged
        for section in sections:
            inner = node.get(section)
            node[section] = dict(inner) if isinstance(inner, dict) else {}
            node = node[section]
        node[field] = value
    return merged


def _validate(model: type[M], tree: dict[str, Any], where: str) -> M:
    """Validate strictly, as JSON: without conversion between text, numbers and booleans."""
    try:
        return model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        lines = [_explain(model, detail) for detail in error.errors()]
        raise UserError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from error
    except (RecursionError, TypeError, ValueError) as error:  # not representable as JSON
        raise UserError(f"{where}: not a configuration: {error}") from error


def _explain(model: type[BaseModel], detail: Any) -> str:
    """One validation error as "path: message (nearest known name)"."""
    location = [str(part) for part in detail["loc"]]
    path, owners = _walk(model, location)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        known = sorted({field for owner in owners for field in owner.model_fields})
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{path}: no such field; {hint}"
    given = "" if detail["type"] in ("missing", "value_error") else f" (given: {shorten(repr(detail['input']))})"
    return f"{path}: {message}{given}" if path else message


def _walk(model: type[BaseModel], location: list[str]) -> tuple[str, list[type[BaseModel]]]:
    """Follow pydantic's location through the models.

    Returns:
        The path as the user wrote it, without the tags of unions that pydantic inserts; and the models that may own
        its last part (several if no tag is given).
    """
    shown: list[str] = []
    annotation: Any = model
    owners: list[type[BaseModel]] = []
    for part in location:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            shown.append(part)
            continue
        candidates = _models(annotation)
        if not candidates and not part.isdigit():  # a member of a union of values
            continue
        tagged = [candidate for candidate in candidates if len(candidates) > 1 and _tag(candidate) == part]
        if tagged:
            annotation = tagged[0]
            continue
        owners = candidates
        shown.append(part)
        annotation = next((owner.model_fields[part].annotation for owner in owners if part in owner.model_fields), None)
    return ".".join(shown), owners


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return kind.default if kind is not None else None
