"""How constrained answers write JSON: llguidance's options for whitespace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

# Allows json.dumps' whitespace or none: with unbounded whitespace, a model could go on with it forever.
# whitespace_pattern does not serve: some releases of llguidance read " ?" as any number of spaces.
ITEM_SEPARATOR: Final = ", ?"
KEY_SEPARATOR: Final = ": ?"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def restricted(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema with llguidance's options for whitespace. Other libraries (xgrammar) ignore them."""
    options = {"whitespace_flexible": False, "item_separator": ITEM_SEPARATOR, "key_separator": KEY_SEPARATOR}
    return {**schema, "x-guidance": options}


def has_layout(answer: str) -> bool:
    """Whether constrained answers can have the whitespace of this JSON. Indented JSON has more."""
    bare = _STRING.sub('""', answer.strip())
    return re.search(r"\s", re.sub(r"([,:]) ", r"\1", bare)) is None
