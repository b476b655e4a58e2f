"""Cases: served requests with the answer that a caller expected, kept until they become rows of a source.

A case becomes evidence as every row does: in a source file with a licence, which `data build` reads, scans for personal
data, deduplicates and counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.files import write_atomic
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.settings import Split
from tunesmith.store.identities import require
from tunesmith.store.store import Store

_FOLDER = "cases/"


class Case(BaseModel):
    """One served request and the answer that was expected. version: digest of the one that answered; by: a user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: str
    messages: tuple[Message, ...]
    expected: str
    answer: str
    version: str
    scores: dict[str, float]
    by: str
    tenant: str
    region: str
    at: str

    @property
    def failed(self) -> bool:
        """Whether any score is below 1."""
        return any(value < 1.0 for value in self.scores.values())


def put_case(store: Store, case: Case) -> None:
    """Store a case until it is added to a source or dropped."""
    store.blobs.put(_key(case), case.model_dump_json().encode(), private=True)


def list_cases(store: Store, *, everything: bool = False) -> list[Case]:
    """Stored cases, oldest first; with everything, also those that were answered right.

    Raises Refused for a damaged one.
    """
    found = []
    for key in store.blobs.keys(_FOLDER):
        try:
            found.append(Case.model_validate_json(store.blobs.get(key)))
        except (ValidationError, ValueError) as error:
            raise Refused("not a valid case", where=store.blobs.where(key), fix="delete the file") from error
    return sorted((case for case in found if everything or case.failed), key=lambda case: (case.at, case.request))


def add_cases(store: Store, cases: Sequence[Case], target: Path, *, licence: str, split: Split, actor: str) -> int:
    """Append cases to a JSONL source, one row each with its origin, and return how many were new.

    split: names the keys that a row needs. Each case gets its own group and the time of its request. Afterwards
    the cases are dropped from the store, and the audit log says who added them where. If the call is killed, the next
    one adds the rest; no case is in the file twice. Raises UsageError if target is not a JSONL file, Refused if actor
    may not build data.
    """
    if target.suffix != ".jsonl":
        raise UsageError(
            "cases can only be added to a JSONL file", where=str(target), fix="name a file that ends in .jsonl"
        )
    require(store, actor, "data.build")
    with store.lock("cases", "adding cases"):
        before = target.read_bytes() if target.is_file() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        there = _requests(before, target)
        fresh = [case for case in cases if case.request not in there]
        rows = b"".join(_row(case, licence, split) for case in fresh)
        detail: dict[str, Any] = {
            "source": target.name,
            "licence": licence,
            "requests": [case.request for case in fresh],
        }
        with store.change(actor, "cases.add", target.name, detail):
            write_atomic(target, before + rows)
        drop_cases(store, cases)
    return len(fresh)


def drop_cases(store: Store, cases: Sequence[Case]) -> None:
    """Delete stored cases and their texts."""
    for case in cases:
        store.blobs.delete(_key(case))


def _key(case: Case) -> str:
    return f"{_FOLDER}{case.request}.json"


def _row(case: Case, licence: str, split: Split) -> bytes:
    answer = {"role": "assistant", "content": case.expected}
    row: dict[str, Any] = {"messages": [*(turn.model_dump() for turn in case.messages), answer], "licence": licence}
    row |= {key: value for key, value in (("tenant", case.tenant), ("region", case.region)) if value}
    row |= dict.fromkeys(split.keys, f"case-{case.request}") | ({split.time: case.at} if split.time else {})
    row["case"] = case.model_dump(mode="json", include={"request", "version", "scores", "by", "at"})
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _requests(data: bytes, target: Path) -> set[str]:
    found = set()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = parse_json(line)
            found.add(str(row.get("case", {}).get("request")))
        except (ValueError, AttributeError) as error:
            where = f"{target}, line {number}"
            raise UsageError("not a JSON row", where=where, fix="correct it, or name another file") from error
    return found
