"""YAML of recipes: bounded before anything is built of it; whatever is wrong names its line."""

import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from msquant.checkpoint.regular_file import read_regular
from msquant.errors import RecipeError

MAX_BYTES = 2**18
"""The longest recipe that comes with msquant has 3,000."""

MAX_NODES = 2_000
"""Keys, values, lists and mappings in all."""

MAX_DEPTH = 20
"""Of mappings and lists within one another."""

MAX_DIGITS = 100
"""Of a number."""


def read_yaml(path: Path) -> Any:
    """What a recipe file holds.

    Raises:
        RecipeError: it cannot be read, is no YAML, or is beyond a limit; names the line.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8")
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f", in line {mark.line + 1}, column {mark.column + 1}"
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"cannot be read as YAML: {problem}{line}", where=path) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RecipeError(f"cannot be read as YAML: {reason}", where=path) from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which would take the last of two equal keys in silence and expand any alias."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        self._nodes += 1
        self._depth += 1
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "an alias (*name) is not read in a recipe, write the value again"
        elif self._nodes > MAX_NODES:
            problem = f"more than {MAX_NODES} keys and values"
        elif self._depth > MAX_DEPTH:
            problem = f"lists and mappings are nested more than {MAX_DEPTH} deep"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_DIGITS and node.tag.endswith(":int"):
            problem = f"a number of {len(node.value)} digits, at most {MAX_DIGITS} are read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        # What PyYAML's constructors raise for `!!int x`, `2001-13-45`, `!!bool x` or `!!timestamp x`.
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            problem = f"{reprlib.repr(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {str(key.value)[:100]} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return mapping
