"""Strict, bounded readers of what others wrote: JSON, YAML, text files, patterns, JSON Schemas."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

_GRAMMAR = "rfc3987_syntax"


class _Later(ModuleType):
    """Stands for a package that jsonschema imports and few use: importing it builds a grammar for 1.5 s."""

    def is_valid_syntax(self, term: str, text: str) -> bool:
        """Whether a text is such a term of RFC 3987, by the package itself."""
        if sys.modules.get(_GRAMMAR) is self:
            del sys.modules[_GRAMMAR]
        return bool(import_module(_GRAMMAR).is_valid_syntax(term, text))


if _GRAMMAR not in sys.modules and find_spec(_GRAMMAR) is not None:
    sys.modules[_GRAMMAR] = _Later(_GRAMMAR)
