"""JSON Schemas that tests share."""

from typing import Any


def closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object with these properties and no other."""
    names = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **names, **more}


SWITCH = closed({"a": {"enum": ["on", "off"]}, "n": {"type": "integer", "minimum": 1, "maximum": 3}})
