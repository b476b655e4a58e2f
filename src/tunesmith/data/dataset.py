"""A dataset version and its examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

from pydantic import BaseModel

from tunesmith.core.digests import canonical_lines, digest_of, short
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Conversation, Message, Turns
from tunesmith.core.text.names import Scope
from tunesmith.core.values import Frozen, View
from tunesmith.data.duplicates import request_text
from tunesmith.data.formats.openai_rules import too_few
from tunesmith.data.formats.row_formats import OPENAI, format_evidence
from tunesmith.records.dataset import DatasetAccount, DatasetBody, ReadSource, RemovedRow
from tunesmith.store.records import Record
from tunesmith.store.store import Store

SPLITS = ("train", "validation", "test")
BALANCED = ("licence", "source", "tenant", "region")  # attributes of examples whose values are counted
REMOVED = "removed.jsonl"
SUBJECTS = "subjects.jsonl"  # further subjects of kept rows, whose copies stated them; a blob if there are any
_ID_LENGTH = 20

Line = TypeVar("Line", bound=BaseModel)


class Example(Frozen):
    """One conversation, whose last message is the assistant's answer. id: a digest of the content and the source.

    labels: key of the row -> value, for the keys that decided its split or that `attributes` keeps.
    """

    id: str
    messages: Turns
    source: str
    licence: str
    group: str
    subject: str | None = None
    tenant: str | None = None
    region: str | None = None
    labels: dict[str, str] = {}  # noqa: RUF012

    @property
    def request(self) -> Turns:
        """The turns before the answer."""
        return self.messages[:-1]

    @property
    def wording(self) -> str:
        """The request as one normalised text, for comparisons."""
        return request_text(self.messages)

    @property
    def earlier(self) -> tuple[int, ...]:
        """For each answer before the last one that training learns: how many turns of the wording come before it."""
        spoken = [turn for turn in self.messages if turn.role != "system"]
        return tuple(n for n, turn in enumerate(spoken[:-1]) if turn.role == "assistant" and turn.weight)

    @property
    def answer(self) -> str:
        """The text that training learns."""
        return self.messages[-1].text

    @property
    def call(self) -> Message | None:
        """The answer's turn where it calls functions; else None."""
        return self.messages[-1] if self.messages[-1].tool_calls else None


def example_id(messages: Conversation, source: str) -> str:
    """The id of a conversation from a source: 80 bits of their digest. The row's place in the file does not matter."""
    further = (turn.model_dump(mode="json", exclude={"role", "content"}) for turn in messages)  # empty for most turns
    content = [
        [turn.role, turn.content, *([more] if more else ())] for turn, more in zip(messages, further, strict=True)
    ]
    return short(digest_of({"messages": content, "source": source}), _ID_LENGTH)


def encode_examples(examples: Sequence[Example]) -> bytes:
    """Canonical JSON lines, sorted by id: the same examples give the same bytes."""
    ordered = sorted(examples, key=lambda example: example.id)
    return canonical_lines(example.model_dump(mode="json") for example in ordered)


class Dataset:
    """A dataset record and its examples, which are read on demand and checked against their digests."""

    def __init__(self, store: Store, digest: str, record: Record, readable: Sequence[str] = SPLITS) -> None:
        """readable: splits whose examples may be read."""
        self._store, self.readable = store, tuple(readable)
        self.digest, self.record = digest, record

    def without_test_rows(self) -> Dataset:
        """The same dataset version, whose test rows cannot be read: for what chooses by other rows."""
        return Dataset(self._store, self.digest, self.record, [name for name in self.readable if name != "test"])

    @cached_property
    def body(self) -> DatasetBody:
        """What its record states. Raises Refused where that is damaged."""
        return DatasetBody.of(self.record)

    @property
    def scope(self) -> Scope:
        """Whose rows these are."""
        return self.body.scope or Scope()

    @property
    def splits(self) -> dict[str, int]:
        """Split name -> number of examples."""
        return {name: self.body.splits[name] for name in SPLITS}

    def examples(self, split: str) -> list[Example]:
        """The examples of a split, sorted by id. Raises UsageError for an unknown split, Refused for damaged data and
        for a split that may not be read here."""
        if split not in SPLITS:
            raise UsageError(f"there is no split {split!r}", fix=f"one of {', '.join(SPLITS)}")
        if split not in self.readable:
            raise Refused(f"the {split} rows may not be read here", where=self.digest, fix="report this as a fault")
        return read_lines(self._store, self.record, f"{split}.jsonl", Example)

    def removed(self) -> list[RemovedRow]:
        """The rows that the build removed."""
        return read_lines(self._store, self.record, REMOVED, RemovedRow)


def read_lines(store: Store, record: Record, name: str, model: type[Line]) -> list[Line]:
    """The lines of one of a record's blobs. Raises Refused where it is missing or damaged."""
    if name not in record.blobs:
        raise Refused(f"the {record.kind} record has no {name}", where=record.digest, fix="make it again")
    try:
        return [model.model_validate_json(line) for line in store.read_blob(record.blobs[name]).splitlines()]
    except ValueError as error:
        raise Refused(f"{name} does not hold {model.__name__} lines: {error}", where=record.digest) from error


def load_dataset(store: Store, digest: str) -> Dataset:
    """Open a dataset version. Raises Refused where it is missing or damaged, UsageError for another kind of record."""
    return Dataset(store, digest, store.record(digest, kind="dataset"))


class SourceSummary(ReadSource):
    """One source file. evidence: how its format is known where the settings do not name it."""

    evidence: str


class DatasetSummary(DatasetAccount, View):
    """A dataset version, with its sources and what people should look at."""

    dataset: str
    sources: tuple[SourceSummary, ...]
    warnings: tuple[str, ...]


def dataset_summary(store: Store, digest: str) -> DatasetSummary:
    """The summary of a dataset version. Raises Refused where its record is missing or damaged."""
    body = DatasetBody.read(store, digest)
    sources = tuple(
        SourceSummary(**dict(source), evidence=format_evidence(source.format, told=source.format_told))
        for source in body.sources
    )
    warnings = [
        f"{source.path}: {warning}"
        for source in sources
        if source.format == OPENAI and (warning := too_few(source.rows))
    ]
    if review := body.review:
        if review.unmatched:
            warnings.append(f"{review.path}: {review.unmatched} decisions fit no row of the sources")
        if not review.logged:
            warnings.append(f"{review.path}: the audit log has no export of it: its edits are by nobody known")
    return DatasetSummary.of(body, dataset=digest, sources=sources, warnings=tuple(warnings))
