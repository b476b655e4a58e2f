"""Writes a JSON Schema as rules of a Lark grammar, which can say more than a schema: keys in any order, copied fields.

llguidance holds answers to a schema with keys in the schema's order. But the order of keys says nothing in JSON, and
rows often have their own: the order in which a request mentions things. Held to the schema's order, a model that has
learned from such rows leaves out a key whose turn is over. So an object of up to 64 keys gets a rule with a bit for
each key that is written already (llguidance's parametric grammars).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import JsonObject, values_in
from tunesmith.core.values import Schema
from tunesmith.engines.protocol import ITEM_SEPARATOR, KEY_SEPARATOR, restricted

FIX: Final = "simplify the schema there, or leave the field out of copy"
_NOTES: Final = frozenset(
    {
        *("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "$anchor", "$defs", "definitions"),
    }
)
OBJECT: Final = frozenset({"properties", "required", "additionalProperties"})
ARRAY: Final = frozenset({"items", "minItems", "maxItems"})
_HELD: Final = OBJECT | ARRAY | {"type"}
Bounds = tuple[int, int | None]  # the fewest and the most characters of a copied value
_MOST_KEYS: Final = 64  # bits of a rule's parameter
LETTER: Final = r"(\\(u[0-9a-fA-F]{4}|[^u])|[^\"\\])"  # of a JSON string, as it is written
# A name has one spelling only: by \\u0062, a listed name could be written a second time, with another value.
_TERMINALS: Final = rf"""
ITEM: /{ITEM_SEPARATOR}/
KEY: /{KEY_SEPARATOR}/
NAME: /"(\\[\"\\bfnrt]|[^\"\\\x00-\x1F\x7F])*"/
"""


def limits(schema: Schema, known: Collection[str]) -> list[str]:
    """The keys of a schema that may limit its values, without the known ones: not its notes, and not x-... keys."""
    return sorted(key for key in schema.keys() - set(known) - _NOTES if not key.startswith("x-"))


def types_of(schema: Schema) -> list[str]:
    """The JSON types that a schema names."""
    named = schema.get("type", [])
    return [named] if isinstance(named, str) else list(named)


def resolved(root: Schema, reference: str, path: str) -> Any:
    """The part of a schema that a $ref names. Raises UsageError where there is none, and for the name of an $anchor."""
    inner: Any = root
    if reference[:2] not in ("#", "#/"):
        raise _unsupported(f"$ref: {reference}", path)
    try:
        for part in reference.removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    except (KeyError, ValueError, IndexError, TypeError):
        raise _unsupported(f"$ref: {reference}", path) from None
    return inner


def _unsupported(what: str, path: str) -> UsageError:
    return UsageError(f"{path or 'the answer'}: {what} is not supported", fix=FIX)


def is_listed(schema: Schema) -> bool:
    """Whether a schema lists its values."""
    return "enum" in schema or "const" in schema


def orders_keys(schema: Any) -> bool:
    """Whether there is an object in a schema whose keys the rules let come in another order than the schema's."""
    return any(why is None for why in _orders(schema, ""))


def order_kept_by(schema: Schema) -> str | None:
    """Why the rules let no key come out of the schema's order; None where some may, and where no object has two."""
    several = any(
        keys[-1:] == ("properties",) and isinstance(each, dict) and len(each) > 1 for keys, each in values_in(schema)
    )
    reasons = list(_orders(schema, "")) if several else []
    return None if None in reasons else next(iter(reasons), None)


def _orders(schema: Any, path: str) -> Iterator[str | None]:
    """For each object in a schema that may have two keys: None where they come in any order, else the reason."""
    if not isinstance(schema, dict) or is_listed(schema):
        return
    kinds, properties = types_of(schema), schema.get("properties", {})
    if kinds and not {"object", "array"} & set(kinds):
        return
    if further := limits(schema, _HELD) or ([] if kinds else ["a schema without type"]):
        yield _unsupported(further[0], path).what
        return
    if len(properties) > 1:
        many = len(properties) > _MOST_KEYS
        yield _unsupported(f"an object of more than {_MOST_KEYS} keys", path).what if many else None
    inside = f"{path}." if path else ""
    for key, part in {**properties, "*": schema.get("additionalProperties")}.items():
        yield from _orders(part, inside + key)
    yield from _orders(schema.get("items"), f"{path}[]")


class SchemaRules:
    """Writes the rules of a schema.

    fields: paths of the copied ones, whose values are the terminal COPIED. lengths: the bounds (least, most) of copied
    values that the request has words for, None for all. Other copied values are not possible. A value that is not
    possible is None.

    bounds: those of all copied values, once they are written.
    """

    def __init__(self, root: Schema, fields: Sequence[str] = (), lengths: Collection[Bounds] | None = None) -> None:
        self._root, self._fields, self._lengths = root, frozenset(fields), lengths
        self._names: dict[str, str] = {}  # a rule's body -> its name
        self.bounds: set[Bounds] = set()

    def write(self) -> str | None:
        """The rules, without the terminal COPIED; None where no answer is possible."""
        start = self._value(self._root, "")
        if start is None:
            return None
        rules = "".join(f"{name}: {body}\n" for body, name in self._names.items())
        return f"start: {start}\n{rules}{_TERMINALS}"

    def _rule(self, body: str) -> str:
        """The name of the rule with this body."""
        return self._names.setdefault(body, f"r{len(self._names)}")

    def _value(self, schema: Any, path: str) -> str | None:
        inside = tuple(field for field in self._fields if field.startswith((f"{path}.", f"{path}[")) or not path)
        copies = path in self._fields or bool(inside)
        if not isinstance(schema, dict) or is_listed(schema) or not (copies or orders_keys(schema)):
            return self._plain(schema, path)
        if "$ref" in schema:
            self._only(schema, {"$ref"}, path)
            return self._value(resolved(self._root, schema["$ref"], path), path)
        if "anyOf" in schema:
            self._only(schema, {"anyOf"}, path)
            return self._any([self._value(part, path) for part in schema["anyOf"]])
        if not (kinds := types_of(schema)):
            raise _unsupported("a schema without type", path)
        return self._any([self._typed(schema, kind, path) for kind in kinds])

    def _typed(self, schema: Schema, kind: str, path: str) -> str | None:
        if kind in ("object", "array"):
            self._only(schema, _HELD, path)
            return self._object(schema, path) if kind == "object" else self._array(schema, path)
        if kind == "string" and path in self._fields:
            return self._copied(schema)
        return self._plain({**schema, "type": kind}, path)

    def _copied(self, schema: Schema) -> str | None:
        """A terminal for the copied values of a schema."""
        least, longest = max(1, int(schema.get("minLength", 0))), schema.get("maxLength")
        most = None if longest is None else int(longest)
        if most is not None and most < least:
            return None
        self.bounds.add((least, most))
        if self._lengths is not None and (least, most) not in self._lengths:
            return None
        if (least, most) == (1, None):
            return "COPIED"
        length = f"/{LETTER}{{{least},{'' if most is None else most}}}/"
        return self._names.setdefault(rf'"\"" (VALUE & {length}) "\""', f"COPIED_{len(self._names)}")

    def _object(self, schema: Schema, path: str) -> str | None:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        further, inside = schema.get("additionalProperties", True), f"{path}." if path else ""
        members: list[tuple[str, bool]] = []
        listed = list(dict.fromkeys([*properties, *required]))
        for key in listed:
            value = self._value(properties.get(key, further), inside + (key if key in properties else "*"))
            if value is None and key in required:
                return None
            if value is not None:
                members.append((f"{self._plain({'const': key}, path)} KEY {value}", key in required))
        other = self._value(further, f"{inside}*")
        pair = "" if other is None else f"{self._name(listed)} KEY {other}"
        if not members and not pair:
            return self._rule('"{" "}"')
        body = self._in_any_order if len(members) <= _MOST_KEYS else self._in_order
        return self._rule(f'"{{" {body(members, pair)} "}}"')

    def _in_any_order(self, members: Sequence[tuple[str, bool]], pair: str) -> str:
        """The members of an object in any order, each once. Bits of the rule's parameter say which ones are written.

        members: key and value, and whether it is required. pair: any other key with its value; "" where none may be.
        """
        ordered = sorted(members, key=lambda member: not member[1])
        needed = sum(required for _, required in members)
        end = f'"" %if is_ones([0:{needed}])' if needed else '""'
        first, later = (f"{which}{len(self._names)}" for which in ("first", "later"))
        written = [f"{member} {later}::set_bit({bit})" for bit, (member, _) in enumerate(ordered)]
        others = [f"{pair} {later}::_"] if pair else []
        self._names[" | ".join([end, *written, *others])] = f"{first}::_"
        again = [f"ITEM {each} %if bit_clear({bit})" for bit, each in enumerate(written)]
        self._names[" | ".join([end, *again, *(f"ITEM {each}" for each in others)])] = f"{later}::_"
        return f"{first}::0x0"

    def _in_order(self, members: Sequence[tuple[str, bool]], pair: str) -> str:
        """The members of an object in the schema's order, then others."""
        # From the last member back: what may follow where no member is written yet, and where one is.
        first = self._rule(f"({pair} (ITEM {pair})*)?" if pair else '""')
        later = self._rule(f"(ITEM {pair})*" if pair else '""')
        for member, needed in reversed(members):
            first = self._rule(f"{member} {later}" + ("" if needed else f" | {first}"))
            later = self._rule(f"ITEM {member} {later}" + ("" if needed else f" | {later}"))
        return first

    def _name(self, listed: Sequence[str]) -> str:
        """A terminal for the keys that the schema does not list."""
        if not listed:
            return "NAME"
        spelled = [json.dumps(json.dumps(key, ensure_ascii=False), ensure_ascii=False) for key in listed]
        return self._names.setdefault(f"NAME & ~({' | '.join(spelled)})", f"NAME_{len(self._names)}")

    def _array(self, schema: Schema, path: str) -> str | None:
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        if most is not None and most < least:
            return None
        item = None if most == 0 else self._value(schema.get("items", True), f"{path}[]")
        if item is None:
            return self._rule('"[" "]"') if least == 0 else None
        more = f"{max(0, least - 1)},{'' if most is None else int(most) - 1}"
        several = item if most == 1 else f"{item} (ITEM {item}){{{more}}}"  # a grammar may not say {0,0}
        return self._rule(f'"[" {several} "]"' if least else f'"[" ({several})? "]"')

    def _plain(self, schema: Any, path: str) -> str | None:
        """A schema with no copied field in it."""
        if schema is False:
            return None
        own: JsonObject = {} if schema is True else dict(schema)
        if '"$ref"' in json.dumps(own):
            # Within the grammar "#" means this part, in the definitions too.
            own |= {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
            targets = re.findall(r'"\$ref": "([^"]*)"', json.dumps(own))
            if outside := [each for each in targets if not each.startswith(("#/$defs/", "#/definitions/"))]:
                raise _unsupported(f"$ref: {outside[0]}", path)
        if "$schema" in self._root:
            own["$schema"] = self._root["$schema"]
        return self._rule(f"%json {json.dumps(restricted(own), ensure_ascii=False)}")

    def _any(self, rules: Sequence[str | None]) -> str | None:
        possible = list(dict.fromkeys(each for each in rules if each is not None))
        if len(possible) > 1:
            return self._rule(" | ".join(possible))
        return possible[0] if possible else None

    def _only(self, schema: Schema, known: Collection[str], path: str) -> None:
        if further := limits(schema, known):
            raise _unsupported(further[0], path)
