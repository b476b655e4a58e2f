"""Reads the JSON Schema of answers, refuses a schema that is costly or fetches something, and validates answers.

This is the only validator: build, evaluation, serving and monitoring all use `satisfies`. Model output is untrusted, so
its work is bounded: patterns run in linear time (patterns.py), and a check ends after a number of steps, which is the
same on every machine. References may only point inside the schema, so nothing is fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import attrs
import jsonschema
import jsonschema_specifications
import referencing
import referencing.jsonschema
from jsonschema import validators

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.patterns import check_pattern, search, work
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.values import Schema

# A keyword applied to a value is a step, with more for long lists and for searches. So many take one or two seconds.
_STEPS: Final = 50_000
_WORK_OF_A_STEP: Final = 2048  # of a pattern's search
_STEPS_OF_A_SCHEMA: Final = 1_000_000  # to check the schema itself
_LARGEST: Final = 1 << 20
_KEPT: Final = 16
_HOLDS_SCHEMAS: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
_HOLDS_DATA: Final = frozenset({"const", "enum", "default", "examples"})
_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")
_NUMBERS: Final = (int, float)

Errors = Iterator[jsonschema.ValidationError]
Keyword = Callable[[Any, Any, Any, Any], Errors | None]


class _TooCostly(Exception):
    """A check takes more steps than it may."""


class _Left(threading.local):
    """The steps that this thread's check may still take."""

    steps = 0


_left = _Left()


def load_answer_schema(path: Path) -> dict[str, Any]:
    """The schema in a file. Raises UsageError, naming the file, where it cannot be read or used."""
    text = read_text_file(path, "the answer schema", _LARGEST)
    try:
        schema = parse_json(text)
    except NotJson as error:
        raise UsageError(f"the answer schema is not JSON: {error}", where=str(path), fix="correct the file") from error
    check_answer_schema(schema, str(path))
    return schema  # type: ignore[no-any-return]


def check_answer_schema(schema: Any, where: str) -> None:
    """Raise UsageError for a schema that is not valid, refers outside itself, or is too costly to check."""
    if not isinstance(schema, dict):
        raise UsageError("the answer schema is not a JSON object", where=where)
    try:
        dialect = _dialect(schema, where)
        meta = _bounded(dialect)(dialect.META_SCHEMA, registry=jsonschema_specifications.REGISTRY)
        _left.steps = _STEPS_OF_A_SCHEMA
        if error := next(meta.iter_errors(schema), None):
            raise UsageError(f"not valid JSON Schema: {error.message[:300]}", where=f"{where}, {error.json_path}")
        parts = dict(_parts(schema, "$"))
        for place, part in parts.items():
            _check_part(part, f"{where}, {place}", parts)
        _check_references(schema, dialect, {id(part) for part in parts.values()})
        probes: tuple[Any, ...] = (None, True, 0, "", [], {}, [{}], {"a": {}})
        for probe in probes:
            _check(probe, schema)
    except referencing.exceptions.Unresolvable as error:
        raise UsageError(
            f"the answer schema has a $ref to nothing: {str(error)[:200]}", where=where, fix="correct the $ref"
        ) from error
    except (_TooCostly, RecursionError) as error:
        endless = isinstance(error, RecursionError)
        what = "refers to itself without end" if endless else "needs too many steps, even for small answers"
        fix = "let each $ref that leads back stand under properties or items, and use fewer alternatives"
        raise UsageError(f"the answer schema {what}", where=where, fix=fix) from error


def satisfies(value: Any, schema: Schema) -> bool:
    """Whether a JSON value is valid under a checked schema.

    A value whose check takes more than 50,000 steps (keywords applied to values) counts as not valid. Raises
    UsageError where the schema itself cannot be followed: check_answer_schema refuses all such schemas that it sees.
    """
    try:
        return _check(value, schema)
    except (_TooCostly, RecursionError):
        return False
    except (referencing.exceptions.Unresolvable, jsonschema.exceptions.UnknownType) as error:
        raise UsageError(
            f"the answer schema cannot be followed: {str(error)[:200]}", where="answer schema", fix="correct the schema"
        ) from error


def _check(value: Any, schema: Schema) -> bool:
    _left.steps = _STEPS
    return next(_validator(schema).iter_errors(value), None) is None


_validators: dict[int, tuple[Schema, Any]] = {}


def _validator(schema: Schema) -> Any:
    """The schema's validator, kept for the schemas used last. The kept schema's id stays taken, so it names it."""
    kept = _validators.get(id(schema))
    if kept is None:
        # An empty registry fetches nothing; jsonschema's default fetches over the network.
        kept = schema, _bounded(_dialect(schema, "answer schema"))(schema, registry=referencing.Registry())
        while len(_validators) >= _KEPT:
            _validators.pop(next(iter(_validators), 0), None)
        _validators[id(schema)] = kept
    return kept[1]


def _dialect(schema: Schema, where: str) -> Any:
    named = schema.get("$schema", jsonschema.Draft202012Validator.META_SCHEMA["$schema"])
    dialect = validators.validator_for({"$schema": named}, default=None) if isinstance(named, str) else None
    if dialect is None:
        raise UsageError(f"{str(named)[:200]!r} is not a known version of JSON Schema", where=f"{where}, $.$schema")
    if dialect is jsonschema.Draft3Validator:  # its types may be schemas, and of any name
        raise UsageError(
            "draft-03 of JSON Schema is not supported",
            where=f"{where}, $.$schema",
            fix="write the schema in draft-04 or later, best in draft 2020-12",
        )
    return dialect


def _parts(schema: Any, place: str) -> Iterator[tuple[str, Schema]]:
    """Every subschema with its place. const, enum, default and examples hold data, not schemas."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _parts(item, f"{place}[{index}]")
    elif isinstance(schema, dict):
        yield place, schema
        for key, value in schema.items():
            if key in _HOLDS_SCHEMAS and isinstance(value, dict):
                for name, part in value.items():
                    yield from _parts(part, f"{place}.{key}.{name}")
            elif key not in _HOLDS_DATA:
                yield from _parts(value, f"{place}.{key}")


def _check_part(part: Schema, where: str, parts: Mapping[str, Schema]) -> None:
    for key in _REFERENCES:
        target = part.get(key)
        if isinstance(target, str) and not target.startswith("#"):
            raise UsageError(
                f"the answer schema refers outside itself: {target[:200]!r}",
                where=where,
                fix="copy that schema into $defs",
            )
    if isinstance(part.get("$schema"), str) and part is not parts["$"]:
        raise UsageError("only the whole schema may name its $schema", where=where, fix="remove it here")
    if "unevaluatedProperties" in part and any("patternProperties" in other for other in parts.values()):
        raise UsageError(
            "unevaluatedProperties together with patternProperties is not supported",
            where=where,
            fix="use additionalProperties",
        )
    named, own = part.get("patternProperties"), part.get("pattern")
    for pattern in [*(named if isinstance(named, dict) else ()), *([own] if isinstance(own, str) else ())]:
        check_pattern(pattern, where)


def _check_references(schema: Schema, dialect: Any, parts: set[int]) -> None:
    """Raise Unresolvable for a reference to something that is not a part of the schema."""
    specification = referencing.jsonschema.specification_with(dialect.META_SCHEMA.get("$schema"))
    whole: Any = specification.create_resource(schema)
    root: Any = referencing.Registry().resolver_with_root(whole)
    waiting, seen = [(whole, root)], {id(schema)}
    while waiting:
        resource, resolver = waiting.pop()
        contents = resource.contents if isinstance(resource.contents, dict) else {}
        for key in _REFERENCES:
            if isinstance(target := contents.get(key), str):
                resolved = resolver.lookup(target)
                target_part = resolved.contents
                if not isinstance(target_part, bool) and id(target_part) not in parts:
                    raise referencing.exceptions.Unresolvable(target)
                if id(target_part) not in seen:  # it may stand under a keyword that is not known, so walk it from here
                    seen.add(id(target_part))
                    waiting.append((specification.create_resource(target_part), resolved.resolver))
        waiting += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]


def _spend(steps: int) -> None:
    _left.steps -= steps
    if _left.steps < 0:
        raise _TooCostly


def _counted(keyword: Keyword) -> Keyword:
    """The keyword's function, which also counts its steps."""

    def counted(validator: Any, setting: Any, value: Any, schema: Any) -> Errors | None:
        lengths = sum(len(each) for each in (setting, value) if isinstance(each, dict | list))
        _spend(1 + lengths // 16)
        return keyword(validator, setting, value, schema)

    return counted


def _bounded(dialect: Any) -> Any:
    """The dialect's validator, with bounded work. Subschemas never bring a validator of their own."""
    own: dict[str, Keyword] = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
        "enum": _enum,
        "multipleOf": _multiple_of,
    }
    known = {name: own.get(name, keyword) for name, keyword in dialect.VALIDATORS.items()}
    bounded = validators.extend(dialect, {name: _counted(keyword) for name, keyword in known.items()})
    # jsonschema would choose the class again wherever a part names a $schema: one without these bounds.
    bounded.evolve = attrs.evolve
    return bounded


def _found(pattern: str, text: str) -> bool:
    _spend(work(pattern, text) // _WORK_OF_A_STEP)
    return search(pattern, text)


def _pattern(validator: Any, pattern: str, value: Any, _schema: Any) -> Errors:
    if validator.is_type(value, "string") and not _found(pattern, value):
        yield jsonschema.ValidationError(f"the text does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, _schema: Any) -> Iterator[Any]:
    if validator.is_type(value, "object"):
        for pattern, part in patterns.items():
            _spend(len(value) // 4)
            for key in value:
                if _found(pattern, key):
                    yield from validator.descend(value[key], part, path=key, schema_path=pattern)


def _additional_properties(validator: Any, part: Any, value: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(value, "object"):
        return
    patterns, known = schema.get("patternProperties", {}), schema.get("properties", {})
    _spend(len(value) * len(patterns) // 4)
    for key in value:
        if key in known or any(_found(pattern, key) for pattern in patterns):
            continue
        if part is False:
            yield jsonschema.ValidationError(f"{key!r} is not a known key")
        elif isinstance(part, dict):
            yield from validator.descend(value[key], part, path=key)


def _unique_items(validator: Any, unique: Any, value: Any, _schema: Any) -> Errors:
    if unique and validator.is_type(value, "array") and len({_hashable(each) for each in value}) < len(value):
        yield jsonschema.ValidationError("two items are equal")


def _enum(_validator: Any, listed: Any, value: Any, _schema: Any) -> Errors:
    # A text equals texts only, and `in` is fast for the tens of thousands of labels that a list may have.
    wanted = _hashable(value)
    if not (value in listed if isinstance(value, str) else any(wanted == _hashable(each) for each in listed)):
        yield jsonschema.ValidationError("the value is not one of those listed")


def _multiple_of(validator: Any, factor: Any, value: Any, _schema: Any) -> Errors:
    # As decimals: a quotient of floats says that 0.07 is no multiple of 0.01. Of whole numbers and doubles, both short.
    if validator.is_type(value, "number") and Fraction(repr(value)) % Fraction(repr(factor)):
        yield jsonschema.ValidationError(f"{value} is not a multiple of {factor}")


def _hashable(value: Any) -> Any:
    """A value that is equal for equal JSON values: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, dict):
        return "object", frozenset((key, _hashable(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_hashable, value))
    return ("number", value) if isinstance(value, _NUMBERS) and not isinstance(value, bool) else (type(value), value)
