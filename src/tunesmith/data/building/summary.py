"""The summary of a dataset version: what `data build` prints and reports show."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.core.view import Omitted, View
from tunesmith.data.formats.openai_rules import too_few
from tunesmith.data.formats.row_formats import OPENAI, format_evidence
from tunesmith.records.dataset import (
    AppliedReview,
    Conflicts,
    DatasetBody,
    Duties,
    Leakage,
    NearClusters,
    OutsideSet,
    PrivacyScan,
    ReadSource,
    RowCounts,
    Strata,
    TimeSplit,
    TokenLengths,
)
from tunesmith.store.store import Store


class SourceSummary(ReadSource):
    """One source file. evidence: how its format is known where the settings do not name it."""

    evidence: str


class DatasetSummary(View):
    """A dataset version. privacy: entity -> values found; privacy_scan: the scan's measured recall.

    groups: rows of a group are always in one split. duties: what the rows' licences demand. ignored_keys: keys of rows
    that no format reads -> rows. respelled: rows, of those read, whose JSON answers were written as constrained
    decoding writes them, None where there are none. time, strata: how the rows were split, if not by a hash of their
    group. tokens: None where no length was checked.
    """

    dataset: str
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
    review = body.review
    if review is not None and review.unmatched:
        warnings.append(f"{review.path}: {review.unmatched} decisions fit no row of the sources")
    if review is not None and not review.logged:
        warnings.append(f"{review.path}: the audit log has no export of it: its edits are by nobody known")
    return DatasetSummary.of(body, dataset=digest, sources=sources, warnings=tuple(warnings))
