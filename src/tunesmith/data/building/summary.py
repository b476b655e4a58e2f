"""The summary of a dataset version: what `data build` prints and reports show."""

from __future__ import annotations

from typing import Any

from tunesmith.core.view import Omitted, View
from tunesmith.data.formats.openai_rules import too_few
from tunesmith.data.formats.row_formats import OPENAI, format_evidence
from tunesmith.data.splitting.leakage import Leakage
from tunesmith.store.store import Store


class RowCounts(View):
    """Rows of the sources. changed: kept, but not as they were read; removed: reason -> rows."""

    read: int
    kept: int
    changed: int
    removed: dict[str, int]


class SourceSummary(View):
    """One source file. format_told: the settings name the format; evidence: how it is known otherwise."""

    path: str
    digest: str
    bytes: int
    rows: int
    format: str
    format_told: bool
    evidence: str
    split: Omitted[str] = None


class NearClusters(View):
    """Similar requests of one split that were kept because their answers differ. examples: ids of the largest."""

    clusters: int
    rows: int
    largest: int
    examples: tuple[tuple[str, ...], ...]


class Conflicts(View):
    """Equal requests with different answers. examples: ids of some."""

    requests: int
    rows: int
    examples: tuple[tuple[str, ...], ...]


class AppliedReview(View):
    """A file of review decisions. accept, edit, reject: decisions that the build applied; unmatched: those that fit no
    row of the sources. logged: whether the audit log has the file's export."""

    path: str
    digest: str
    accept: int
    edit: int
    reject: int
    unmatched: int
    logged: bool = False


class TokenLengths(View):
    """The most tokens that a row may have, and the most that one has."""

    limit: int
    longest: int


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
    splits: dict[str, int]
    groups: dict[str, int]
    leakage: Leakage
    decontaminated: tuple[dict[str, Any], ...]
    near_clusters: NearClusters
    time: Omitted[dict[str, Any]] = None
    strata: Omitted[dict[str, Any]] = None
    licences: dict[str, int]
    duties: Omitted[dict[str, Any]] = None
    privacy: dict[str, int]
    privacy_scan: dict[str, Any]
    ignored_keys: dict[str, int]
    conflicts: Conflicts
    tokens: TokenLengths | None
    review: Omitted[AppliedReview] = None
    sources: tuple[SourceSummary, ...]
    warnings: tuple[str, ...]


def dataset_summary(store: Store, digest: str) -> DatasetSummary:
    """The summary of a dataset version. Raises Refused where its record is missing or damaged."""
    body = store.record(digest, kind="dataset").body
    sources = [
        SourceSummary(**source, evidence=format_evidence(source["format"], told=source["format_told"]))
        for source in body["sources"]
    ]
    warnings = [
        f"{source.path}: {warning}"
        for source in sources
        if source.format == OPENAI and (warning := too_few(source.rows))
    ]
    if unmatched := body.get("review", {}).get("unmatched"):
        warnings.append(f"{body['review']['path']}: {unmatched} decisions fit no row of the sources")
    if body.get("review", {}).get("logged") is False:
        warnings.append(f"{body['review']['path']}: the audit log has no export of it: its edits are by nobody known")
    stated = {key: body[key] for key in DatasetSummary.model_fields if key in body and key != "sources"}
    return DatasetSummary(dataset=digest, **stated, sources=tuple(sources), warnings=tuple(warnings))
