"""The families whose arithmetic is our own. Cheap to import: who only asks which way a base goes needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from tunesmith.core.errors import UsageError

GEMMAS = ("gemma", "gemma2", "gemma3_text")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", *GEMMAS)
# What is said wherever a base goes the other way.
SLOW = "is run by transformers' own modules, in fp32 on the processor: as correct, and slower than a family of our own"


def ours(family: str) -> bool:
    """Whether engines/native/network/network.py computes a family; any other runs in engines/hf/model.py."""
    return family in FAMILIES


def matching(wanted: Iterable[str], names: Iterable[str]) -> tuple[set[str], list[str]]:
    """The names of linear layers that are meant, and what means none of them. wanted: names or patterns as a shell's
    (`*_proj`, `[qv]_proj`), and `all`."""
    known, found, unknown = set(names), set[str](), []
    for each in wanted:
        meant = {name for name in known if each == "all" or fnmatchcase(name, each)}
        found |= meant
        if not meant:
            unknown.append(each)
    return found, unknown


def meant(wanted: Iterable[str], names: Sequence[str], where: str) -> set[str]:
    """The names that are meant. Raises UsageError, about the setting at where, for what means none of them."""
    found, unknown = matching(wanted, names)
    if unknown:
        raise UsageError(f"no linear layer is called {unknown[0]!r}; there are {', '.join(names)}, all", where=where)
    return found
