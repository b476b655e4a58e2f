"""A record: what one stage of the chain states, as canonical JSON that never changes. Its digest is its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused

KINDS = (
    "base",
    "dataset",
    "documents",
    "training",
    "search",
    "candidate",
    "answers",
    "evaluation",
    "verdict",
    "version",
    "approval",
    "export",
)


class Record(BaseModel):
    """One stage's result.

    kind: one of KINDS. parents: role -> digest of another record. blobs: file name -> digest of its bytes.
    body: what the stage states, JSON. The record's digest is that of its canonical JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    parents: Mapping[str, str] = {}
    blobs: Mapping[str, str] = {}
    body: Mapping[str, Any] = {}

    @cached_property
    def encoded(self) -> bytes:
        """Canonical bytes."""
        return canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """The record's name."""
        return digest_bytes(self.encoded)


def decode(data: bytes, digest: str, where: str) -> Record:
    """Read a record's bytes. Raises Refused if they do not have the digest or are not a record."""
    if digest_bytes(data) != digest:
        raise Refused("the record's bytes do not have its digest", where=where, fix="restore it from a backup")
    try:
        return Record.model_validate(json.loads(data))
    except (ValidationError, ValueError) as error:
        raise Refused(f"not a record: {error}", where=where, fix="restore it from a backup") from error
