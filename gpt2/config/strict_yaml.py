"""YAML 1.2's core schema for recipes and overrides.

PyYAML implements YAML 1.1, in which 010 is 8, 1:30 is 90, yes is true, 1e-4 is text, and the last of two equal keys
wins. Here 1e-4 is a number, equal keys and tags are errors, and 010, 1:30, 1_000, yes and 2026-01-01 are text, which
numeric and boolean fields refuse.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_CORE = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
}
"""type -> (pattern, possible first letters); the first matching type applies"""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"the tag {tag} is not supported", event.start_mark)
        return super().compose_node(parent, index)

    def text(self, node: yaml.Node) -> str:
        return str(self.construct_scalar(node))  # type: ignore[arg-type]  # other nodes raise

    def sequence(self, node: yaml.Node) -> list[Any]:
        return self.construct_sequence(node, deep=True)  # type: ignore[arg-type]

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text: put it in quotes", key_node.start_mark
                )
            if key in result:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice: remove one", key_node.start_mark
                )
            result[key] = self.construct_object(value_node, deep=True)
        return result


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or this module reads as something else."""


for _type, (_pattern, _letters) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_type}",
            re.compile(f"(?:{_pattern})$"),
            ["", *_letters] if _type == "null" else [*_letters],
        )
for _type, _construct in {
    "null": lambda loader, node: None,
    "bool": lambda loader, node: loader.text(node).lower() == "true",
    "int": lambda loader, node: int(loader.text(node)),
    "float": lambda loader, node: float(loader.text(node)),
    "str": _Loader.text,
    "seq": _Loader.sequence,
    "map": _Loader.mapping,
}.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_type}", _construct)


def load(text: str) -> Any:
    """Read one document.

    Raises:
        ValueError: invalid YAML, with reason and place in one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem}{where}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more than 4,300 digits
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump(tree: dict[str, Any]) -> str:
    """Write YAML that `load` reads back unchanged."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
