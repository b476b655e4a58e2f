"""Spells JSON as constrained decoding writes it: on one line, with letters where \\u escapes are not needed.

There are many ways to write one JSON value, and decoding under a schema allows few of them. A model that has learned
from rows with another spelling, such as indented JSON or the \\u00e9 of json.dumps, wants tokens that are forbidden.
"""

from __future__ import annotations

import json
import re
from typing import Final

from tunesmith.core.reading.strict_json import NotJson, parse_json

# A string, a comma or colon with the white space around it, or other white space.
_PARTS: Final = re.compile(r'("[^"\\]*+(?:\\.[^"\\]*+)*+")|\s*+([,:])\s*+|\s++', re.DOTALL)


def as_decoded(text: str) -> str:
    """The same JSON value as constrained decoding can write it; the text itself if it can already, or is not JSON.

    Numbers keep their digits: 1.50 does not become 1.5.
    """
    try:
        parse_json(text)
    except NotJson:
        return text
    return _PARTS.sub(_respelled, text)


def _respelled(part: re.Match[str]) -> str:
    string, mark = part[1], part[2]
    if string is not None:
        if "\\u" in string or "\\/" in string:
            string = json.dumps(json.loads(string), ensure_ascii=False)
        return str(string).replace("\x7f", "\\u007f")
    if mark is None:
        return ""
    return part[0] if part[0] in (mark, f"{mark} ") else f"{mark} "
