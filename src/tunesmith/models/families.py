"""The families whose arithmetic is our own. Cheap to import: who only asks which way a base goes needs no torch."""

from __future__ import annotations

GEMMAS = ("gemma", "gemma2", "gemma3_text")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", *GEMMAS)
# What is said wherever a base goes the other way.
SLOW = "is run by transformers' own modules, in fp32 on the processor: as correct, and slower than a family of our own"


def ours(family: str) -> bool:
    """Whether models/network.py computes a family; any other runs in models/foreign.py."""
    return family in FAMILIES
