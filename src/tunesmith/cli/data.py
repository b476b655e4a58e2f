"""`tunesmith data`: build dataset versions, inspect them, verify them, sign them off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunesmith import services
from tunesmith.cli.terminal import (
    Acting,
    Drawn,
    Here,
    NotNegative,
    Positive,
    Terminal,
    add_commands,
    add_group,
    printed_text,
    table,
)
from tunesmith.core.digests import short
from tunesmith.core.system.files import write_atomic
from tunesmith.core.text.display import json_text

if TYPE_CHECKING:
    from tunesmith.data.building.signoff import DatasetVerification
    from tunesmith.data.dataset import DatasetSummary
    from tunesmith.data.governance.difference import Difference
    from tunesmith.records.dataset import NamedPeople, PrivacyScan
    from tunesmith.services.datasets import DatasetPage, Originals, QualityReport, RemovedRows, ShownDataset

_Newest = Annotated[str | None, typer.Argument(help="A dataset version's digest or its start; by default the newest.")]
_Version = Annotated[str, typer.Argument(help="A dataset version's digest or its start.")]
_Output = Annotated[Path | None, typer.Option(help="Write it to this file instead.")]


def register(app: typer.Typer) -> None:
    """Add the `data` commands."""
    group = add_group(app, "data", "Build and inspect dataset versions.")
    add_commands(
        group, build, show, verify, originals, diff, removed, datasheet, croissant, sign, quality, list=list_datasets
    )


def build(here: Here, *, engine: Literal["local", "ray"] = "local") -> None:
    """Read, check, clean, split and freeze the project's sources.

    engine: What reads the rows. The dataset is the same.
    """
    here.emit(services.datasets.build(here.project, engine=engine, progress=Terminal()), draw_summary)


def list_datasets(here: Here, *, page: Positive = 1) -> None:
    """List dataset versions, newest first, with the stewards who signed them off.

    page: 25 versions each.
    """
    here.emit(services.datasets.list_datasets(here.store, page), draw_list)


def show(here: Here, dataset: _Newest = None, *, split: str = "train", limit: NotNegative = 10) -> None:
    """Show the summary of a dataset version and its first rows.

    split: train, validation, test or removed.
    limit: Rows to show; 0 shows all.
    """
    version = services.datasets.show(here.store, dataset, split=split, limit=limit)
    here.emit(version, lambda shown: [*draw_summary(shown), *draw_rows(shown)])


def verify(here: Here, dataset: _Newest = None) -> int:
    """Recompute a dataset version's digests, counts and leakage. Exit 3 on any difference from its record."""
    verification = services.datasets.verify(here.store, dataset)
    here.emit(verification, draw_verification)
    return 0 if verification.ok else 3


def originals(here: Here, *, row: str | None = None, new_key: bool = False) -> None:
    """Show what pseudonyms stand for, if data.privacy.originals keeps it and you have the key.

    row ID: Only those of one example.
    new_key: Print a key for $TUNESMITH_ORIGINALS_KEY.
    """
    if new_key:
        made = services.datasets.new_originals_key()
        here.emit(made, made.key)
    else:
        here.emit(services.datasets.originals(here.project, row), draw_originals)


def diff(here: Here, before: _Version, after: _Version) -> None:
    """Show what changed between two dataset versions: rows, splits, licences, balance."""
    here.emit(services.datasets.difference(here.store, before, after), draw_difference)


def removed(here: Here, dataset: _Version, *, each: Positive = 5) -> None:
    """Show a sample of the rows that were left out, for each reason, read again from the sources.

    each: Rows of each reason.
    """
    here.emit(services.datasets.removed(here.store, dataset, here.directory, each), draw_removed)


def datasheet(here: Here, dataset: _Version, *, output: _Output = None) -> None:
    """Write a datasheet in Markdown."""
    digest, text = services.datasets.datasheet(here.store, dataset, here.directory.absolute().name)
    _print_or_write(here, digest, "datasheet", text, output)


def croissant(here: Here, dataset: _Version, *, output: _Output = None) -> None:
    """Write Croissant 1.0 metadata (JSON-LD)."""
    digest, text = services.datasets.croissant(here.store, dataset, here.directory.absolute().name)
    _print_or_write(here, digest, "croissant", text, output)


def sign(here: Acting, dataset: _Version, *, reason: str) -> None:
    """Verify a dataset version and sign it off as its steward. The audit log records it.

    reason: What was looked at.
    """
    here.show(services.datasets.sign, lambda signed: f"{signed.steward} signed off {short(signed.dataset)}")


def quality(
    here: Here,
    dataset: _Version,
    *,
    label_noise: Annotated[bool, typer.Option()] = False,
    language: Annotated[bool, typer.Option()] = False,
    names: Annotated[bool, typer.Option()] = False,
    alike: Annotated[bool, typer.Option()] = False,
    limit: NotNegative = 20,
) -> None:
    """Flag rows that a person should look at. Drops none. The store keeps the flags as a record.

    label_noise: Also look for wrong labels (extra: quality).
    language: Also look for other languages (extra: quality).
    names: Count people's names, by the scan's model (extra: privacy).
    alike: Find requests that say the same, by MiniLM (downloaded once).
    limit: Flags to show; 0 shows all.
    """
    here.emit(services.datasets.quality(here.store, **here.given, progress=Terminal()), draw_quality)


def _print_or_write(here: Here, digest: str, what: str, text: str, output: Path | None) -> None:
    if output is not None:
        write_atomic(output, text.encode())
    shown = text if output is None else str(output)
    here.emit({"dataset": digest, what: shown}, printed_text(shown))


def draw_summary(summary: DatasetSummary) -> Drawn:
    """A table of what a dataset version holds and what was left out."""
    yield table(_summary_rows(summary), title=f"Dataset version {short(summary.dataset)}")


def draw_list(page: DatasetPage) -> Drawn:
    """A line for each dataset version."""
    rows = []
    for one in page.datasets:
        signed = f"unreadable: {one.unreadable}" if one.unreadable else ", ".join(one.signed)
        counts = ("", "", "") if one.unreadable else (one.read, one.kept, one.removed)
        rows.append((one.dataset[7:19], one.at[:16], *counts, signed))
    title = f"{len(rows)} of {page.total} dataset versions"
    yield table(rows, "dataset", "at", "read", "kept", "left out", "signed off by", title=title)


def draw_rows(dataset: ShownDataset) -> Drawn:
    """The rows of a split, turn by turn."""
    yield f"\n{dataset.split}: {len(dataset.examples)} of {dataset.total} rows"
    for row in dataset.examples:
        if hasattr(row, "reason"):  # it was left out
            yield json_text(row.model_dump())
            continue
        yield f"\n{row.id}  {row.group}  {row.licence}", "dim"
        for turn in row.messages:
            yield f"  {turn.role}: {turn.content}"
            for call in turn.tool_calls:
                yield f"    calls {call.name} {call.arguments}"


def draw_verification(verification: DatasetVerification) -> Drawn:
    """The problems of a dataset version, and the outcome."""
    for problem in verification.problems:
        yield f"{problem.path}: {problem.reason}"
    for name in verification.erased:
        yield f"{name}: rows of it were erased; the record's counts were not compared"
    outcome = "is what its record says" if verification.ok else f"has {len(verification.problems)} problems"
    yield f"{short(verification.dataset)} {outcome} ({verification.checked} things checked)"


def draw_originals(known: Originals) -> Drawn:
    """One line for each pseudonym."""
    for row, pairs in known.originals.items():
        for pseudonym, original in pairs.items():
            yield f"{row}  {pseudonym}  {original}"


def draw_difference(difference: Difference) -> Drawn:
    """A table of rows before and after."""
    rows = [(split, *counts) for split, counts in difference.splits.items()]
    shown = {name: values for name, values in difference.balance.items() if set(values) != {""}}
    for name, values in {**shown, "removed": difference.removed_reasons}.items():
        rows += [(f"{name}: {value or '(none)'}", *counts) for value, counts in values.items()]
    yield table(rows, "", "before", "after", title="From one dataset version to the other")
    yield ", ".join(f"{number} {what}" for what, number in difference.rows.items())
    for path, (before, after) in difference.settings.items():
        yield f"setting {path}: {json_text(before)}, then {json_text(after)}"


def draw_removed(sample: RemovedRows) -> Drawn:
    """The sampled rows under their reasons."""
    for reason, rows in sample.removed.items():
        yield f"\n{reason}", "bold"
        for row in rows:
            yield f"  {row.source}, row {row.row}: {json_text(row.fields)}"


def draw_quality(report: QualityReport) -> Drawn:
    """The number of flagged rows, the balance of the rows, and the first flags."""
    for what, rows in report.flagged.items():
        yield f"{what}: {rows} of {report.rows} rows"
    for what, counts in report.balance.items():
        if set(counts) not in (set(), {""}):
            most = sorted(counts.items(), key=lambda pair: -pair[1])[:8]
            shown = ", ".join(f"{value or '(none)'} {number}" for value, number in most)
            yield f"balance by {what}: {shown}"
    if report.names:
        yield from _draw_names(report.names, report.rows)
    for flag in report.examples:
        yield f"  {flag.id}  {flag.flag}: {flag.detail}"


def _summary_rows(summary: DatasetSummary) -> Iterator[tuple[str, object]]:
    for source in summary.sources:
        how = "told" if source.format_told else "detected"  # --json has the evidence
        held = ", held out" if source.split == "test" else ""
        yield f"source {source.path}", f"{source.rows} rows, format {source.format} ({how}){held}"
    for warning in summary.warnings:
        yield "warning", warning
    yield "read", summary.rows.read
    yield "kept", f"{summary.rows.kept} ({summary.rows.changed} changed)"
    for reason, number in summary.rows.removed.items():
        yield f"removed: {reason}", number
    for name, number in summary.splits.items():
        yield name, f"{number} rows in {summary.groups[name]} groups"
    leakage = summary.leakage
    yield "leakage", f"{leakage.shared_groups} shared groups, {leakage.near_pairs} near pairs at {leakage.threshold}"
    for name, number in (leakage.shared or {}).items():
        yield f"leakage by {name}", f"{number} in two splits"
    yield from _splitting_rows(summary)
    for outside in summary.decontaminated:
        yield "compared with", f"{outside.path}, {outside.rows} rows"
    near = summary.near_clusters
    if near.clusters:
        yield "near, answers differ", f"{near.clusters} clusters, {near.rows} rows, the largest {near.largest}"
    for licence, number in summary.licences.items():
        yield f"licence {licence}", number
    for entity, number in summary.privacy.items():
        yield f"found: {entity}", number
    yield from _scan_rows(summary.privacy_scan)
    for key, number in summary.ignored_keys.items():
        yield f"key not read: {key}", f"in {number} rows"
    if review := summary.review:
        yield f"reviewed, {review.path}", f"{review.accept} accepted, {review.edit} edited, {review.reject} rejected"
    if conflicts := summary.conflicts.requests:
        yield "conflicts", f"{conflicts} requests with different answers, {summary.conflicts.rows} rows"


def _splitting_rows(summary: DatasetSummary) -> Iterator[tuple[str, str]]:
    if summary.time:
        for name, (first, last) in summary.time.spans.items():
            yield f"time of {name}", f"{first[:19]} to {last[:19]} by {summary.time.key}"
    if summary.strata:
        kinds = summary.strata.rows
        bare = [kind for kind, rows in kinds.items() if not rows["test"]]
        missing = f", {len(bare)} of them not in the test: {', '.join(bare[:5])}" if bare else ", all in the test"
        yield f"kinds by {summary.strata.key}", f"{len(kinds)}{missing}"


def _scan_rows(scan: PrivacyScan) -> Iterator[tuple[str, str]]:
    """What the privacy scan found, and its recall on synthetic values inserted into these rows."""
    for role, counts in scan.fields.items():
        yield f"found in: {role}", ", ".join(f"{entity} {number}" for entity, number in counts.items())
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


def _draw_names(people: NamedPeople, rows: int) -> Drawn:
    genders = ", ".join(f"{gender} {number}" for gender, number in people.genders.items())
    error = people.reference.entities["PERSON"] if people.reference else None
    accuracy = f"; on annotated text recall {error.recall}, precision {error.precision}" if error else ""
    by = people.model.package if people.model else "patterns"
    times = f"{people.mentions} mentions of {people.distinct} names, the most frequent {people.most} times"
    yield f"people named: in {people.rows} of {rows} rows, {times}; suggested: {genders} ({by}{accuracy})"
    yield f"  ({people.caveat})"
