"""How dataset versions, their differences and their flags are drawn on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.cli.terminal import Drawn, table
from tunesmith.core.digests import short
from tunesmith.core.text.display import json_text

if TYPE_CHECKING:
    from tunesmith.data.building.signoff import DatasetVerification
    from tunesmith.data.dataset import DatasetSummary
    from tunesmith.data.governance.difference import Difference
    from tunesmith.records.dataset import NamedPeople, PrivacyScan
    from tunesmith.services.datasets import DatasetPage, Originals, QualityReport, RemovedRows, ShownDataset


def draw_summary(found: DatasetSummary) -> Drawn:
    """A table of what a dataset version holds and what was left out."""
    yield table(_summary_rows(found), title=f"Dataset version {short(found.dataset)}")


def draw_list(found: DatasetPage) -> Drawn:
    """A line for each dataset version."""
    rows = [
        (
            *(one.dataset[7:19], one.at[:16], one.read, one.kept, one.removed),
            f"unreadable: {one.unreadable}" if one.unreadable else ", ".join(one.signed),
        )
        for one in found.datasets
    ]
    title = f"{len(rows)} of {found.total} dataset versions"
    yield table(rows, "dataset", "at", "read", "kept", "left out", "signed off by", title=title)


def draw_rows(found: ShownDataset) -> Drawn:
    """The rows of a split, turn by turn."""
    yield f"\n{found.split}: {len(found.examples)} of {found.total} rows"
    for row in found.examples:
        if hasattr(row, "reason"):  # it was left out
            yield json_text(row.model_dump())
            continue
        yield f"\n{row.id}  {row.group}  {row.licence}", "dim"
        for turn in row.messages:
            yield f"  {turn.role}: {turn.content}"
            for call in turn.tool_calls:
                yield f"    calls {call.name} {call.arguments}"


def draw_verification(found: DatasetVerification) -> Drawn:
    """The problems of a dataset version, and the outcome."""
    for problem in found.problems:
        yield f"{problem.path}: {problem.reason}"
    outcome = "is what its record says" if found.ok else f"has {len(found.problems)} problems"
    yield f"{short(found.dataset)} {outcome} ({found.checked} things checked)"


def draw_originals(found: Originals) -> Drawn:
    """One line for each pseudonym."""
    for row, pairs in found.originals.items():
        for pseudonym, original in pairs.items():
            yield f"{row}  {pseudonym}  {original}"


def draw_difference(found: Difference) -> Drawn:
    """A table of rows before and after."""
    rows = [(split, *counts) for split, counts in found.splits.items()]
    shown = {name: values for name, values in found.balance.items() if set(values) != {""}}
    for name, values in {**shown, "removed": found.removed_reasons}.items():
        rows += [(f"{name}: {value or '(none)'}", *counts) for value, counts in values.items()]
    yield table(rows, "", "before", "after", title="From one dataset version to the other")
    yield ", ".join(f"{number} {what}" for what, number in found.rows.items())
    for path, (before, after) in found.settings.items():
        yield f"setting {path}: {json_text(before)}, then {json_text(after)}"


def draw_removed(found: RemovedRows) -> Drawn:
    """The sampled rows under their reasons."""
    for reason, rows in found.removed.items():
        yield f"\n{reason}", "bold"
        for row in rows:
            yield f"  {row.source}, row {row.row}: {json_text(row.fields)}"


def draw_quality(found: QualityReport) -> Drawn:
    """The number of flagged rows, the balance of the rows, and the first flags."""
    for what, rows in found.flagged.items():
        yield f"{what}: {rows} of {found.rows} rows"
    for what, counts in found.balance.items():
        if set(counts) not in (set(), {""}):
            most = sorted(counts.items(), key=lambda pair: -pair[1])[:8]
            shown = ", ".join(f"{value or '(none)'} {number}" for value, number in most)
            yield f"balance by {what}: {shown}"
    if found.names:
        yield from _draw_names(found.names, found.rows)
    for flag in found.examples:
        yield f"  {flag.id}  {flag.flag}: {flag.detail}"


def _summary_rows(found: DatasetSummary) -> Iterator[tuple[str, object]]:
    for source in found.sources:
        how = "told" if source.format_told else "detected"  # --json has the evidence
        held = ", held out" if source.split == "test" else ""
        yield f"source {source.path}", f"{source.rows} rows, format {source.format} ({how}){held}"
    for warning in found.warnings:
        yield "warning", warning
    yield "read", found.rows.read
    yield "kept", f"{found.rows.kept} ({found.rows.changed} changed)"
    for reason, number in found.rows.removed.items():
        yield f"removed: {reason}", number
    for name, number in found.splits.items():
        yield name, f"{number} rows in {found.groups[name]} groups"
    leakage = found.leakage
    yield "leakage", f"{leakage.shared_groups} shared groups, {leakage.near_pairs} near pairs at {leakage.threshold}"
    for name, number in (leakage.shared or {}).items():
        yield f"leakage by {name}", f"{number} in two splits"
    yield from _splitting_rows(found)
    for outside in found.decontaminated:
        yield "compared with", f"{outside.path}, {outside.rows} rows"
    near = found.near_clusters
    if near.clusters:
        yield "near, answers differ", f"{near.clusters} clusters, {near.rows} rows, the largest {near.largest}"
    for licence, number in found.licences.items():
        yield f"licence {licence}", number
    for entity, number in found.privacy.items():
        yield f"found: {entity}", number
    yield from _scan_rows(found.privacy_scan)
    for key, number in found.ignored_keys.items():
        yield f"key not read: {key}", f"in {number} rows"
    if review := found.review:
        yield f"reviewed, {review.path}", f"{review.accept} accepted, {review.edit} edited, {review.reject} rejected"
    if conflicts := found.conflicts.requests:
        yield "conflicts", f"{conflicts} requests with different answers, {found.conflicts.rows} rows"


def _splitting_rows(found: DatasetSummary) -> Iterator[tuple[str, str]]:
    if found.time:
        for name, (first, last) in found.time.spans.items():
            yield f"time of {name}", f"{first[:19]} to {last[:19]} by {found.time.key}"
    if found.strata:
        kinds = found.strata.rows
        bare = [kind for kind, rows in kinds.items() if not rows["test"]]
        missing = f", {len(bare)} of them not in the test: {', '.join(bare[:5])}" if bare else ", all in the test"
        yield f"kinds by {found.strata.key}", f"{len(kinds)}{missing}"


def _scan_rows(scan: PrivacyScan) -> Iterator[tuple[str, str]]:
    """What the privacy scan found, and its recall on synthetic values inserted into these rows."""
    for role, found in scan.fields.items():
        yield f"found in: {role}", ", ".join(f"{entity} {number}" for entity, number in found.items())
    measured = scan.synthetic
    missed = {entity: one for entity, one in measured.items() if one.found < one.inserted}
    for entity, one in sorted(missed.items(), key=lambda pair: pair[1].recall)[:3]:
        recall = f"recall at least {one.recall_at_least:.0%}"
        yield f"scan for {entity}", f"finds {one.found} of {one.inserted} synthetic values ({recall})"
    if whole := [one for entity, one in measured.items() if entity not in missed]:
        least = min(one.recall_at_least for one in whole)
        yield f"scan for {len(whole)} kinds", f"finds all synthetic values (recall at least {least:.0%} each)"
    if measured:
        left = scan.left.at_most
        yield "probably left", "no bound" if left is None else f"at most {left:g} values (95%)"


def _draw_names(found: NamedPeople, rows: int) -> Drawn:
    genders = ", ".join(f"{gender} {number}" for gender, number in found.genders.items())
    error = found.reference.entities["PERSON"] if found.reference else None
    accuracy = f"; on annotated text recall {error.recall}, precision {error.precision}" if error else ""
    by = found.model.package if found.model else "patterns"
    times = f"{found.mentions} mentions of {found.distinct} names, the most frequent {found.most} times"
    yield f"people named: in {found.rows} of {rows} rows, {times}; suggested: {genders} ({by}{accuracy})"
    yield f"  ({found.caveat})"
