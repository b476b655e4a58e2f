"""The file of review decisions that a build reads: which rows are left out, and which are read as reviewers wrote them.

A decision holds for the row that was reviewed and for every row with the same folded request and answer, so that no
copy in another file takes the place of a rejected row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator
from sqlalchemy import select

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.messages import Turns
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.values import Digest, Frozen
from tunesmith.data.dataset import Example
from tunesmith.data.governance.withdrawn import content_key
from tunesmith.data.settings import DataSettings
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow

REJECTED: Final = "rejected in a review"
EXPORTED: Final = "review.export"  # in the audit log, with the digest of the file
Choice = Literal["accept", "edit", "reject"]


class ReviewedRow(Frozen):
    """What reviewers decided on a row. row: its id; content: its `content_key`; why: what it was reviewed for.

    messages: the turns as the reviewers wrote them, for an edit. by: who decided, the last of them in the end.
    """

    row: str = Field(min_length=1, max_length=128)
    content: Digest
    decision: Choice
    why: tuple[Annotated[str, Field(max_length=200)], ...] = ()
    messages: Turns = ()
    by: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _edits_have_turns(self) -> ReviewedRow:
        if (self.decision == "edit") != bool(self.messages):
            raise ValueError("an edit has messages, and no other decision has")
        return self

    @property
    def reason(self) -> str:
        """Why a build leaves the row out."""
        return f"{REJECTED}: {self.why[0]}" if self.why else REJECTED


class Reviewed(NamedTuple):
    """The decisions of a file, by the row's id and by its content. path, digest: of the file; "" without one.

    logged: whether the store's audit log names this file as exported. Other decisions are edits by nobody known: their
    `by` does not count.
    """

    rows: Mapping[str, ReviewedRow] = {}
    contents: Mapping[str, ReviewedRow] = {}
    path: str = ""
    digest: str = ""
    logged: bool = False

    def of(self, example: Example) -> ReviewedRow | None:
        """The decision on a row; on a row with its content where there is none on the row itself."""
        if not self.rows:
            return None
        return self.rows.get(example.id) or self.contents.get(content_key(example))


def read_reviewed(path: str | None, root: Path, store: Store) -> Reviewed:
    """The decisions in a file of the project; none without a path, or where the file is not there yet.

    store: whose audit log has the exported files. Raises UsageError for a file that is not one of decisions.
    """
    if path is None or not os.path.lexists(root / path):
        return Reviewed()
    try:
        data = (root / path).read_bytes()
    except OSError as error:
        where = f"data.review: {path}"
        raise UsageError(f"the file of review decisions cannot be read: {error.strerror}", where=where) from error
    rows, fix = dict[str, ReviewedRow](), NextStep("write the file again", "review export")
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            one = ReviewedRow.model_validate(parse_json(line))
        except (ValidationError, ValueError) as error:
            fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UsageError(f"not a review decision: {fault}", where=where, fix=fix) from None
        if one.row in rows:
            raise UsageError(f"a second decision on row {one.row}", where=where, fix=fix)
        rows[one.row] = one
    contents = {one.content: one for one in sorted(rows.values(), key=lambda one: one.decision == "reject")}
    digest = digest_bytes(data)
    with store.reading() as session:
        details = session.scalars(select(AuditRow.detail).where(AuditRow.action == EXPORTED))
        logged = any(detail.get("file") == digest for detail in details)
    return Reviewed(rows, contents, path, digest, logged)


def applied_settings(settings: DataSettings, reviewed: Reviewed) -> DataSettings:
    """The settings that a build follows: without `review` where the file holds no decision, so that to name it changes
    no dataset version."""
    return settings if reviewed.rows else settings.model_copy(update={"review": None})


def encode_reviewed(rows: Iterable[ReviewedRow]) -> bytes:
    """The file's bytes: one decision a line, sorted by row, so that the same decisions give the same bytes."""
    ordered = sorted(rows, key=lambda one: one.row)
    lines = (json.dumps(one.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False) for one in ordered)
    return "".join(f"{line}\n" for line in lines).encode()
