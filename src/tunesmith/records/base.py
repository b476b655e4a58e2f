"""What bases state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tunesmith.records.body import Body, Part


class StoredFile(Part):
    """A file by its digest. bytes: its size."""

    digest: str
    bytes: int


class BaseBody(Body):
    """A base's files, which stay in place. fingerprint: of what rendering depends on, tokenizer and template. files:
    path in the base's folder -> file."""

    kind: ClassVar = "base"

    spec: str
    family: str
    context_length: int
    fingerprint: str
    files: Mapping[str, StoredFile]

    @property
    def line(self) -> str:
        """How a project file names it."""
        return self.spec
