"""How constrained answers write JSON: llguidance's options for whitespace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Allows json.dumps' whitespace or none: with unbounded whitespace, a model could go on with it forever.
# whitespace_pattern does not serve: some releases of llguidance read " ?" as any number of spaces.
ITEM_SEPARATOR: Final = ", ?"
KEY_SEPARATOR: Final = ": ?"


def restricted(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema with llguidance's options for whitespace. Other libraries (xgrammar) ignore them."""
    options = {"whitespace_flexible": False, "item_separator": ITEM_SEPARATOR, "key_separator": KEY_SEPARATOR}
    return {**schema, "x-guidance": options}
