"""The summary of a dataset version: what `data build` prints and reports show."""

from __future__ import annotations

from tunesmith.core.view import View
from tunesmith.data.formats.openai_rules import too_few
from tunesmith.data.formats.row_formats import OPENAI, format_evidence
from tunesmith.records.dataset import DatasetAccount, DatasetBody, ReadSource
from tunesmith.store.store import Store


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
    review = body.review
    if review is not None and review.unmatched:
        warnings.append(f"{review.path}: {review.unmatched} decisions fit no row of the sources")
    if review is not None and not review.logged:
        warnings.append(f"{review.path}: the audit log has no export of it: its edits are by nobody known")
    return DatasetSummary.of(body, dataset=digest, sources=sources, warnings=tuple(warnings))
