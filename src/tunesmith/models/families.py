"""Which model families the native engine computes, and how settings name linear layers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from tunesmith.core.errors import UsageError

GEMMAS = ("gemma", "gemma2", "gemma3_text")
NATIVE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", *GEMMAS)
# Shown wherever a base is of another family.
SLOW = "is run by transformers' own modules: as exact as the native engine, but slower on a CPU"


def is_native(family: str) -> bool:
    """Whether the native engine computes a family; the hf engine runs any other."""
    return family in NATIVE_FAMILIES


def match_layers(wanted: Iterable[str], names: Iterable[str], where: str) -> set[str]:
    """The names that match wanted: names, shell patterns such as `*_proj` and `[qv]_proj`, or `all`.

    where: the setting that wanted comes from. Raises UsageError for an entry that matches no name.
    """
    known, found = sorted(names), set[str]()
    for each in wanted:
        matches = {name for name in known if each == "all" or fnmatchcase(name, each)}
        if not matches:
            raise UsageError(
                f"the base has no linear layer called {each!r}; it has {', '.join(known)}, or write all", where=where
            )
        found |= matches
    return found
