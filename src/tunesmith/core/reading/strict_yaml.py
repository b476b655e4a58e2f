"""Reads YAML strictly: the values of JSON, each key once, within bounds of depth and of what aliases expand to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import yaml

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import DEEPEST

_MOST_NODES: Final = 100_000  # with each alias counted as large as what it stands for
_LONGEST_NUMBER: Final = 40
_SHOWN: Final = 80
_TAG: Final = "tag:yaml.org,2002:"


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML document. Raises UsageError with the line.

    Dates and times stay text. Refused: a key that occurs twice or is not text, merge keys, tags, more than 64 levels,
    aliases that expand to more than 100,000 values, numbers that are not finite, half surrogate pairs, NUL characters.
    """
    try:
        return yaml.load(text, Loader=_Strict)  # noqa: S506 - a SafeLoader
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        raise UsageError(what, where=f"{where}, line {line}", fix="remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line_of = f", line {mark.line + 1}" if mark is not None else ""
        what = f"not valid YAML: {str(error.problem or error.context)[: 3 * _SHOWN]}"
        raise UsageError(what, where=f"{where}{line_of}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"not valid YAML: {str(error)[: 3 * _SHOWN]}", where=where) from error


def _refused(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


class _Strict(yaml.SafeLoader):
    """A SafeLoader that refuses what read_yaml names. sizes: the anchor of a finished node -> nodes inside."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth, self._nodes = 0, 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        anchor: str | None = event.anchor
        before = self._nodes
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self._sizes:
                raise _refused(f"the alias *{anchor} stands inside its own value", event.start_mark)
            self._count(self._sizes.get(anchor or "", 1), event.start_mark)
            return super().compose_node(parent, index)
        if event.tag is not None:
            raise _refused(f"the tag {str(event.tag)[:_SHOWN]} is not supported: write plain values", event.start_mark)
        self._count(1, event.start_mark)
        self._depth += 1
        if self._depth > DEEPEST:
            raise _refused(f"it is nested more than {DEEPEST} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None:
            self._sizes[anchor] = self._nodes - before
        return node

    def _count(self, nodes: int, mark: Any) -> None:
        self._nodes += nodes
        if self._nodes > _MOST_NODES:
            raise _refused(f"it holds more than {_MOST_NODES:,} values, aliases expanded", mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                raise _refused("merge keys (<<) are not supported: write the keys out", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                said = f"the key {str(key)[:_SHOWN]} is not text: put it in quotes"
                raise _refused(said, key_node.start_mark)
            if key in seen:
                raise _refused(f"the key {key[:_SHOWN]!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _refused("the text holds a NUL character or half of a surrogate pair", node.start_mark)
        return text

    def number(self, node: yaml.ScalarNode) -> int | float | str:
        if ":" in node.value:  # YAML 1.1 reads 1:30 as 90
            return self.text(node)
        said = node.value[:_SHOWN]
        try:
            if len(node.value) > _LONGEST_NUMBER:
                raise ValueError("it has too many digits")
            read = self.construct_yaml_int if node.tag == f"{_TAG}int" else self.construct_yaml_float
            number: int | float = read(node)
        except (ValueError, OverflowError, IndexError) as error:
            raise _refused(f"the number {said!r} cannot be read: {error}", node.start_mark) from None
        if not math.isfinite(number):
            raise _refused(f"the number {said!r} is not finite", node.start_mark)
        return number


def _constructors() -> dict[Any, Callable[[Any, Any], Any]]:
    safe = yaml.SafeLoader.yaml_constructors
    kept = {f"{_TAG}{name}": safe[f"{_TAG}{name}"] for name in ("null", "bool", "seq", "map")}
    texts = {f"{_TAG}{name}": _Strict.text for name in ("str", "timestamp", "value", "merge")}
    numbers = {f"{_TAG}{name}": _Strict.number for name in ("int", "float")}
    return {**kept, **texts, **numbers}


_Strict.yaml_constructors = _constructors()
