"""What dataset versions, their sign-offs and their flags, and documents state."""

from __future__ import annotations

from collections.abc import Mapping
from operator import not_
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, JsonValue

from tunesmith.core.text.names import Scope
from tunesmith.core.values import Omitted
from tunesmith.records.body import Body, Part

Value = TypeVar("Value")
Use = Literal["commercial", "non-commercial"]
IfAny = Annotated[Value, Field(exclude_if=not_)]  # a key that is left out where there is nothing


class RowCounts(Part):
    """Rows of the sources. changed: kept, but not as they were read; removed: reason -> rows."""

    read: int
    kept: int
    changed: int
    removed: Mapping[str, int]


class ReadFile(Part):
    """A file as it was read."""

    path: str
    digest: str


class ReadSource(ReadFile):
    """A source file as it was read. format_told: the settings name the format. split: it holds the rows of that one."""

    bytes: int
    rows: int
    format: str
    format_told: bool
    split: Omitted[str] = None


class OutsideSet(ReadFile):
    """A file of a test set or benchmark that no row may be in."""

    rows: int


class Leakage(Part):
    """What two splits share. All counts are 0 in a sound dataset version.

    near_pairs: pairs of requests at least as similar as threshold. near_outside: rows near a row of an outside test
    set. shared: for each thing that groups are made by, the number of values in two splits; None where only one thing
    makes groups. not_older: rows of train and validation that are not older than every row of the splits after them;
    None where time does not assign rows. beginnings: rows that learn an answer to the request of a row in a later split
    before their last answer; None where there are none.
    """

    shared_groups: int
    near_pairs: int
    near_outside: int
    threshold: float
    method: str
    shared: Omitted[Mapping[str, int]] = None
    not_older: Omitted[int] = None
    beginnings: Omitted[int] = None

    def faults(self) -> dict[str, int]:
        """The counts that are not 0, by their name in the record."""
        faults = {"shared_groups": self.shared_groups, "near_pairs": self.near_pairs, "near_outside": self.near_outside}
        faults |= {f"shared.{name}": number for name, number in (self.shared or {}).items()}
        faults |= {"not_older": self.not_older or 0, "beginnings": self.beginnings or 0}
        return {name: number for name, number in faults.items() if number}


class NearClusters(Part):
    """Similar requests of one split that were kept because their answers differ. examples: ids of the largest."""

    clusters: int
    rows: int
    largest: int
    examples: tuple[tuple[str, ...], ...]


class Conflicts(Part):
    """Equal requests with different answers. examples: ids of some."""

    requests: int
    rows: int
    examples: tuple[tuple[str, ...], ...]


class TimeSplit(Part):
    """Rows split by time. from: split -> the earliest time of its rows. rows_beyond_shares: that splits got, since rows
    of one time stay together. spans: split -> its rows' earliest and latest time."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    key: str
    starts: Annotated[Mapping[str, str], Field(alias="from")]
    rows_beyond_shares: int
    spans: Mapping[str, tuple[str, str]]


class Strata(Part):
    """Rows split in equal shares of each kind. rows: kind -> split -> rows."""

    key: str
    rows: Mapping[str, Mapping[str, int]]


class Credit(Part):
    """A required attribution: a source, the licence of its rows, and the credit line if one is given."""

    source: str
    licence: str
    credit: str | None


class Duties(Part):
    """What the licences of rows require of those who distribute a model trained on them.

    use: the widest that all allow. share_alike: licences that bind the model. unknown: those whose terms are not known.
    """

    use: Use
    attribution: tuple[Credit, ...]
    share_alike: tuple[str, ...]
    unknown: tuple[str, ...]


class ScanModel(Part):
    """The privacy scan's model: its package, and the digest of that."""

    package: str
    digest: str


class DetectionError(Part):
    """Recall and precision on annotated text, by character. precision: None where nothing was found."""

    characters: int
    precision: float | None
    recall: float


class AnnotatedText(Part):
    """The scan's error on annotated text, by entity. command: measures it."""

    text: str
    command: str
    entities: Mapping[str, DetectionError]


class SyntheticValues(Part):
    """The scan's error on synthetic values that were inserted into the rows. recall_at_least: a 95% lower bound."""

    inserted: int
    found: int
    recall: float
    recall_at_least: float
    recall_by_character: float
    precision_by_character: float | None


class RemainingValues(Part):
    """A bound on the values that remain. at_most: with found_and_kept; None where there is no bound. unmeasured:
    entities without a measured recall."""

    at_most: float | None
    confidence: float
    found_and_kept: int
    unmeasured: tuple[str, ...]


class PrivacyScan(Part):
    """The privacy scan of the rows. fields: role of a turn -> entity -> findings. reference: None for a model whose
    error nobody measured. synthetic: by entity."""

    entities: tuple[str, ...]
    model: ScanModel | None
    fields: Mapping[str, Mapping[str, int]]
    reference: AnnotatedText | None
    synthetic: Mapping[str, SyntheticValues]
    left: RemainingValues


class TokenLengths(Part):
    """The most tokens that a row may have, and the most that one has."""

    limit: int
    longest: int


class AppliedReview(ReadFile):
    """A file of review decisions. accept, edit, reject: decisions that the build applied; unmatched: those that fit no
    row of the sources. logged: whether the audit log has the file's export."""

    accept: int
    edit: int
    reject: int
    unmatched: int
    logged: bool = False


class DatasetAccount(Part):
    """What happened to every row of the sources, and proof that the splits share nothing.

    groups: rows of a group are always in one split. time, strata: how the rows were split, if not by a hash of their
    group. licences: rows by licence. duties: what these licences demand. privacy: entity -> values found;
    privacy_scan: the scan's measured recall. ignored_keys: keys of rows that no format reads -> rows. respelled: rows,
    of those read, whose JSON answers were written as constrained decoding writes them, None where there are none.
    tokens: None where no length was checked.
    """

    rows: RowCounts
    respelled: Omitted[int] = None
    splits: Mapping[str, int]
    groups: Mapping[str, int]
    leakage: Leakage
    decontaminated: tuple[OutsideSet, ...]
    near_clusters: NearClusters
    time: Omitted[TimeSplit] = None
    strata: Omitted[Strata] = None
    licences: Mapping[str, int]
    duties: Duties
    privacy: Mapping[str, int]
    privacy_scan: PrivacyScan
    ignored_keys: Mapping[str, int]
    conflicts: Conflicts
    tokens: TokenLengths | None
    review: Omitted[AppliedReview] = None


class DatasetBody(DatasetAccount, Body):
    """A dataset version.

    answer_schema: digest of the schema that every answer satisfies. reviewers: an edited row's id -> who edited it,
    where the audit log knows. held_groups: groups that a source holds out. edits: an edited row's id -> content keys,
    before and after.
    """

    kind: ClassVar = "dataset"

    settings: Mapping[str, JsonValue]
    sources: tuple[ReadSource, ...]
    answer_schema: str | None
    reviewers: IfAny[Mapping[str, tuple[str, ...]]] = Field(default_factory=dict)
    scope: Omitted[Scope] = None
    held_groups: IfAny[tuple[str, ...]] = ()
    edits: IfAny[Mapping[str, tuple[str, ...]]] = Field(default_factory=dict)

    @property
    def line(self) -> str:
        """Its splits."""
        return ", ".join(f"{name} {count}" for name, count in self.splits.items())


class RemovedRow(Part):
    """A line of removed.jsonl: a row that the build left out. id: None where it was not computed. fields: the row as
    its file has it, where somebody asked for that."""

    id: str | None
    source: str
    row: int
    reason: str
    fields: Omitted[JsonValue] = None


class SignOffBody(Body):
    """A steward's sign-off of a dataset version."""

    kind: ClassVar = "signoff"

    steward: str
    reason: str
    at: str


class NamedPeople(Part):
    """Mentions of people in rows. genders: mentions by the gender that a title or the list suggests. most: mentions of
    the most frequent name. Earlier versions counted otherwise, and only caveat is left of that."""

    caveat: str
    model: ScanModel | None = None
    reference: AnnotatedText | None = None
    rows: int = 0
    mentions: int = 0
    distinct: int = 0
    most: int = 0
    genders: Mapping[str, int] = {}


class SimilarRequests(Part):
    """Clusters of requests that mean the same. examples: ids of some."""

    clusters: int
    examples: tuple[tuple[str, ...], ...]


class QualityBody(Body):
    """Rows that a person should look at. flags: flag -> rows. balance: attribute -> value -> rows. languages: of
    requests and of answers -> texts."""

    kind: ClassVar = "quality"

    rows: int
    flags: Mapping[str, int]
    looked_for: tuple[str, ...]
    balance: Mapping[str, Mapping[str, int]]
    names: Omitted[NamedPeople] = None
    languages: Omitted[Mapping[str, Mapping[str, int]]] = None
    alike: Omitted[SimilarRequests] = None


class Flag(Part):
    """A line of flags.jsonl: a row, and why a person should look at it."""

    id: str
    split: str
    flag: str
    detail: str


class DocumentFile(ReadFile):
    """A document as it was read. passages: that were cut from it."""

    bytes: int
    passages: int


class ReadDocuments(Part):
    """The settings of `documents:` that are read again. asked_as: the caller that evaluations stand for. licence: of
    all documents."""

    asked_as: Mapping[str, JsonValue] | None
    licence: str | None


class DocumentsScan(Part):
    """What the privacy scan did with the documents. found: entity -> values."""

    action: str
    found: Mapping[str, int]


class DocumentsBody(Body):
    """Documents that were cut into passages. removed: paragraphs that were left out because of personal data.
    withdrawn: documents that were recalled."""

    kind: ClassVar = "documents"

    settings: ReadDocuments
    files: tuple[DocumentFile, ...]
    passages: int
    removed: int
    privacy: DocumentsScan
    withdrawn: IfAny[tuple[str, ...]] = ()

    @property
    def line(self) -> str:
        """Its size."""
        return f"{self.passages} passages of {len(self.files)} documents"
