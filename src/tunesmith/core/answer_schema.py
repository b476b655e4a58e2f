"""Reads the JSON Schema of answers, refuses a schema that is slow or fetches something, and validates answers.

Model output is untrusted text, and the schema's patterns run over it. So `regex` evaluates the patterns with a time
limit, and each pattern is first tried on texts that make backtracking slow. References may only point inside the
schema, so nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import referencing
import regex
from jsonschema import validators

from tunesmith.core.errors import UsageError

_PATTERN_SECONDS = 0.25
_PUMP_LENGTH = 64
_HOLDS_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_HOLDS_DATA = frozenset({"const", "enum", "default", "examples"})


def load_answer_schema(path: Path) -> dict[str, Any]:
    """The schema in a file. Raises UsageError, naming the file, where it cannot be read or used."""
    try:
        schema = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError("the answer schema does not exist", where=str(path), fix="correct task.schema") from None
    except OSError as error:
        raise UsageError(f"the answer schema cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the answer schema is not JSON: {error}", where=str(path)) from error
    check_answer_schema(schema, str(path))
    return schema  # type: ignore[no-any-return]


def check_answer_schema(schema: Any, where: str) -> None:
    """Raise UsageError for a schema that is not valid, refers outside itself, or has patterns that are too slow."""
    if not isinstance(schema, dict):
        raise UsageError("the answer schema is not a JSON object", where=where)
    try:
        _dialect(schema, where).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"not valid JSON Schema: {error.message}", where=f"{where}, {error.json_path}") from error
    for place, part in _parts(schema, "$"):
        _check_references(part, f"{where}, {place}")
        _check_patterns(part, f"{where}, {place}")
    try:
        probes: tuple[Any, ...] = (None, True, 0, "", [], {}, [{}], {"a": {}})
        for probe in probes:
            satisfies(probe, schema)
    except (referencing.exceptions.Unresolvable, RecursionError) as error:
        endless = isinstance(error, RecursionError)
        what = "refers to itself without end" if endless else f"has a $ref to nothing: {error}"
        raise UsageError(f"the answer schema {what}", where=where) from error


def satisfies(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value is valid under a checked schema. Raises UsageError where a pattern takes too long."""
    return bool(_validator(json.dumps(schema, sort_keys=True)).is_valid(value))


@lru_cache(maxsize=16)
def _validator(encoded: str) -> Any:
    schema = json.loads(encoded)
    bounded = validators.extend(
        _dialect(schema, "answer schema"),
        {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional_properties},
    )
    # An empty registry fetches nothing; jsonschema's default fetches over the network.
    return bounded(schema, registry=referencing.Registry())


def _dialect(schema: Mapping[str, Any], where: str) -> Any:
    named = schema.get("$schema", jsonschema.Draft202012Validator.META_SCHEMA["$schema"])
    found = validators.validator_for({"$schema": named}, default=None) if isinstance(named, str) else None
    if found is None:
        raise UsageError(f"{named!r} is not a known version of JSON Schema", where=f"{where}, $.$schema")
    return found


def _parts(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _check_references(part: Mapping[str, Any], where: str) -> None:
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        target = part.get(key)
        if isinstance(target, str) and not target.startswith("#"):
            raise UsageError(
                f"the answer schema refers outside itself: {target!r}", where=where, fix="copy that schema into $defs"
            )
    if "unevaluatedProperties" in part and "patternProperties" in part:
        raise UsageError(
            "unevaluatedProperties together with patternProperties is not supported",
            where=where,
            fix="use additionalProperties",
        )


def _check_patterns(part: Mapping[str, Any], where: str) -> None:
    named = part.get("patternProperties")
    own = part.get("pattern")
    for pattern in [*(named if isinstance(named, dict) else ()), *([own] if isinstance(own, str) else ())]:
        check_pattern(pattern, where)


def check_pattern(pattern: str, where: str) -> None:
    """Raise UsageError for a pattern that is not a regular expression, or is too slow on repeated letters."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise UsageError(f"the pattern {pattern!r} is not a regular expression: {error}", where=where) from error
    for letter in sorted({*pattern, *"a0 "}):
        # A repeated letter, then one that matches nothing, makes nested quantifiers try every split.
        search(pattern, letter * _PUMP_LENGTH + "\x00", where)


def search(pattern: str, text: str, where: str = "answer schema") -> bool:
    """Whether a pattern occurs in a text. Raises UsageError where the search takes too long."""
    try:
        return regex.search(pattern, text, timeout=_PATTERN_SECONDS) is not None
    except TimeoutError:
        raise UsageError(
            f"the pattern {pattern!r} needs more than {_PATTERN_SECONDS} s for a text of {len(text)} letters",
            where=where,
            fix="rewrite it without repetitions inside repetitions or alternatives that overlap",
        ) from None


def _pattern(validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    if validator.is_type(value, "string") and not search(pattern, value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, _schema: Any) -> Iterator[Any]:
    if validator.is_type(value, "object"):
        for pattern, part in patterns.items():
            for key in value:
                if search(pattern, key):
                    yield from validator.descend(value[key], part, path=key, schema_path=pattern)


def _additional_properties(validator: Any, part: Any, value: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(value, "object"):
        return
    patterns = schema.get("patternProperties", {})
    extras = [
        key for key in value if key not in schema.get("properties", {}) and not any(search(p, key) for p in patterns)
    ]
    for key in extras:
        if part is False:
            yield jsonschema.ValidationError(f"{key!r} is not a known key")
        elif isinstance(part, dict):
            yield from validator.descend(value[key], part, path=key)
