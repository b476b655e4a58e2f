"""Builds a dataset version from files of rows."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

from tunesmith.core.digests import digest_of
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.text.names import Scope
from tunesmith.data.building.examine import RowRules, refuse_control_tokens
from tunesmith.data.building.outside_sets import OUTSIDE, Outside, read_outside
from tunesmith.data.building.shards import LocalRunner, ShardRunner, examined_rows, plan
from tunesmith.data.building.staging import HAS_CONTROL, Account, StagingDatabase, staging_database
from tunesmith.data.dataset import REMOVED, SPLITS, SUBJECTS
from tunesmith.data.governance.licences import duties
from tunesmith.data.privacy.detection_recall import privacy_evidence
from tunesmith.data.privacy.originals import check_originals, keep_originals
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.review.decisions import Reviewed, applied_settings, read_reviewed
from tunesmith.data.settings import DataSettings, Split
from tunesmith.data.splitting.assignment import OLDER, cuts, split_by_time, stratified
from tunesmith.data.splitting.groups import joined_groups
from tunesmith.data.splitting.leakage import (
    NEAR_HELD_OUT,
    NEAR_SAME_ANSWER,
    ComparedRow,
    Nearness,
    Splits,
    clusters,
    leakage,
    rows_to_remove,
)
from tunesmith.records.dataset import (
    AppliedReview,
    Credit,
    DatasetBody,
    ReadSource,
    RowCounts,
    Strata,
    TimeSplit,
    TokenLengths,
)
from tunesmith.store.store import Store

# If more of the training rows than this are near held-out rows, the similarity setting is wrong, not the data.
_MOST_MOVED_OUT = 0.5
_SHOWN_CONFLICTS = 20
_MEASURED_ROWS = 2000  # rows that detection recall is measured on


def build_dataset(
    store: Store,
    rules: RowRules,
    root: Path,
    *,
    scope: Scope = Scope(),
    work: Path | None = None,
    runner: ShardRunner = LocalRunner(),
    progress: Progress = SILENT,
) -> str:
    """Read, check, clean and split the rows; returns the dataset record's digest. The same input gives the same digest.

    rules: without what the build itself reads: outside sets, formats and reviews. root: where the sources' paths start.
    scope: whose rows these are; two tenants with equal rows have two records. work: a folder for temporary files, by
    default `work/build` in the store. runner: runs the shard workers; it does not change the result.

    Raises UsageError for malformed input, Refused where a policy forbids a row.
    """
    from tunesmith.core.reading.answer_schema import check_answer_schema

    settings, answer_schema = rules.settings, rules.answer_schema
    check_originals(settings.privacy, root)
    if answer_schema is not None:
        check_answer_schema(answer_schema, "task.schema")
    account = Account()
    outside = read_outside(settings, root, answer_schema)
    reviewed = read_reviewed(settings.review, root, store)
    if settings.review is not None and not reviewed.rows:
        progress.say(f"{settings.review}: no review decision yet")
    if reviewed.rows and not reviewed.logged:
        progress.say(
            f"{settings.review}: the audit log has no export of this file: its decisions count as edits by nobody known"
        )
    settings = applied_settings(settings, reviewed)
    folder = work or store.local("work", "build")
    with contextlib.ExitStack() as undo:
        folder.mkdir(parents=True, exist_ok=True)
        planned, formats = plan(settings, root, folder, undo)
        rules = rules._replace(settings=settings, outside=outside.wordings, formats=formats, reviewed=reviewed)
        staging = undo.enter_context(staging_database(folder))
        held_out = {one.file.name for one in planned if one.file.source.split}
        for piece in examined_rows(planned, rules, runner, progress):
            staging.add(piece.kept, piece.removed)
            account.merge(piece.account)
        if settings.control_tokens == "refuse":
            tokens = rules.control_tokens if isinstance(rules.control_tokens, Mapping) else {}
            refuse_control_tokens(staging.removed_for(HAS_CONTROL), "set data.control_tokens to drop", tokens)
        staging.drop_copies(account.withdrawn - rules.withdrawn.contents)
        staging.drop_repeats(held_out)
        conflicts = staging.conflicts(_SHOWN_CONFLICTS)
        read = account.read.total()
        progress.say(f"{read} rows read; looking for near ones across the splits")
        starts, beyond, held = _divide(staging, settings, held_out)
        splits = _split(staging, settings, account, outside)
        near = Nearness(splits, settings.duplicates.threshold, outside.requests)
        counted, licensed = counts(splits), staging.licences()
        licences: Counter[str] = Counter()
        credit = {one.file.name: one.file.source.attribution for one in planned}
        credits_ = []
        for source, licence, rows in licensed:
            licences[licence] += rows
            credits_.append(Credit(source=source, licence=licence, credit=credit[source]))
        body = DatasetBody(
            settings=settings.model_dump(mode="json", exclude={"sign_off"}),
            sources=tuple(
                ReadSource(
                    path=file.name,
                    digest=digest,
                    bytes=size,
                    rows=account.read[file.name],
                    format=formats[file.source.path].name,
                    format_told=file.source.format != "auto",
                    split=file.source.split,
                )
                for file, digest, size, _ in planned
            ),
            rows=RowCounts(
                read=read,
                kept=sum(counted["splits"].values()),
                changed=staging.changed(),
                removed=staging.reasons(),
            ),
            **counted,
            licences=licences,
            leakage=leakage(near, settings.split),
            decontaminated=outside.files,
            near_clusters=clusters(near, _SHOWN_CONFLICTS),
            time=None
            if (time := settings.split.time) is None
            else TimeSplit(key=time, starts=starts, rows_beyond_shares=beyond, spans=staging.span(time)),
            strata=_strata(staging, settings.split),
            duties=duties(credits_, settings.licences),
            privacy=account.privacy,
            privacy_scan=privacy_evidence(
                Scanner(settings.privacy, answer_schema),
                account.privacy,
                account.fields,
                [example.messages for example in staging.sample(_MEASURED_ROWS)],
            ),
            ignored_keys=account.ignored,
            conflicts=conflicts,
            tokens=None
            if rules.count_tokens is None or rules.max_tokens is None
            else TokenLengths(limit=rules.max_tokens, longest=account.longest),
            answer_schema=None if answer_schema is None else digest_of(answer_schema),
            review=_review(reviewed, account),
            reviewers={row: reviewed.rows[row].by for row in account.edits} if reviewed.logged else {},
            scope=None if scope.unlimited else scope,
            held_groups=tuple(held),
            respelled=account.respelled or None,
            edits={row: tuple(sorted(contents)) for row, contents in account.edits.items()},
        )
        blobs = {f"{name}.jsonl": _sealed(store, folder, staging.lines(name)) for name in SPLITS}
        blobs[REMOVED] = _sealed(store, folder, staging.removed_lines())
        if subjects := b"".join(staging.subject_lines()):
            blobs[SUBJECTS] = store.put_bytes(subjects)
        if outside.files:
            blobs[OUTSIDE] = store.put_bytes(outside.encode())
        keep_originals(settings.privacy, root, account.originals, staging.ids())
        by_split = ", ".join(f"{rows} {name}" for name, rows in body.splits.items())
        removed = ", ".join(f"{rows} {reason}" for reason, rows in body.rows.removed.items())
        progress.say(f"{body.rows.kept} rows kept: {by_split}" + (f". Removed: {removed}" if removed else ""))
    return store.put_record(body.record({}, blobs))


def _divide(
    staging: StagingDatabase, settings: DataSettings, held_out: Set[str]
) -> tuple[dict[str, str], int, list[str]]:
    """Assign the rows to splits; returns what `cuts` found, if time divides them, and the groups that are held out.

    held_out: sources whose rows are held out with their groups.
    """
    split = settings.split
    if split.joined:
        rows = [one for some in staging.compared_rows().values() for one in some]
        staging.regroup(joined_groups(rows, split, settings.duplicates.threshold), split)
    held = staging.hold_out(held_out)
    if split.stratify is not None:
        staging.place_groups(stratified(staging.kinds(split.stratify), split, frozenset(held)))
    if split.time is None:
        return {}, 0, held
    starts, beyond = cuts(staging.times(split.time), split)
    staging.place_times(split.time, lambda time: split_by_time(time, starts), OLDER)
    return starts, beyond, held


def _strata(staging: StagingDatabase, split: Split) -> Strata | None:
    """How strata divide the remaining rows."""
    if split.stratify is None:
        return None
    kinds: dict[str, dict[str, int]] = {}
    for name, kind, rows in staging.kinds(split.stratify, by="split"):
        kinds.setdefault(kind, dict.fromkeys(SPLITS, 0))[name] = rows
    return Strata(key=split.stratify, rows=kinds)


def _review(reviewed: Reviewed, account: Account) -> AppliedReview | None:
    """The file of review decisions, and how many of them this build applied; None without a decision."""
    if not reviewed.rows:
        return None
    applied = Counter(reviewed.rows[row].decision for row in account.reviewed)
    return AppliedReview(
        path=reviewed.path,
        digest=reviewed.digest,
        accept=applied["accept"],
        edit=applied["edit"],
        reject=applied["reject"],
        unmatched=len(reviewed.rows.keys() - account.reviewed.keys()),
        logged=reviewed.logged,
    )


def _sealed(store: Store, folder: Path, lines: Iterable[bytes]) -> str:
    """Store lines as a blob; returns its digest."""
    path = folder / "lines"
    try:
        with path.open("wb") as stream:
            stream.writelines(lines)
        return store.put_file(path)
    finally:
        path.unlink(missing_ok=True)


def counts(splits: Splits) -> dict[str, dict[str, int]]:
    """Rows and groups of each split."""
    return {
        "splits": {name: len(splits[name]) for name in SPLITS},
        "groups": {name: len({row.group for row in splits[name]}) for name in SPLITS},
    }


def _split(
    staging: StagingDatabase, settings: DataSettings, account: Account, outside: Outside
) -> dict[str, list[ComparedRow]]:
    """The splits without near duplicates. Raises UsageError or Refused where too few rows remain."""
    splits, threshold = staging.compared_rows(), settings.duplicates.threshold
    _require_rows(splits, staging, account)
    gone = rows_to_remove(splits, threshold, outside.requests)
    if settings.duplicates.near is None:  # rows that are equal only when folded may say different things
        gone = {name: reason for name, reason in gone.items() if reason != NEAR_SAME_ANSWER}
    moved_out = sum(gone.get(one.id) == NEAR_HELD_OUT for one in splits["train"])
    if moved_out > _MOST_MOVED_OUT * len(splits["train"]):
        raise Refused(
            f"{moved_out} of {len(splits['train'])} training rows are near a held-out row (similarity {threshold})",
            where="data.duplicates.near",
            fix="move the text that all requests share into a system turn, group the rows by what makes them similar "
            "(data.split.group_by), or raise near",
        )
    staging.drop(gone)
    left = {name: [one for one in some if one.id not in gone] for name, some in splits.items()}
    _require_rows(left, staging, account)
    return left


def _require_rows(splits: Mapping[str, Sequence[ComparedRow]], staging: StagingDatabase, account: Account) -> None:
    for name in ("train", "test"):
        if not splits[name]:
            sizes = ", ".join(f"{split}: {len(rows)}" for split, rows in splits.items())
            removed = "; ".join(f"{reason}: {n}" for reason, n in staging.reasons().items())
            groups = [row.group for some in splits.values() for row in some]
            if len(groups) > 1 and len(set(groups)) == 1:
                raise UsageError(
                    f"no rows are left for {name}: all {len(groups)} rows are one group, and a group is never divided"
                    f" ({sizes}; removed: {removed or 'none'})",
                    where="data.split.group_by",
                    fix="without group_by, requests that differ in their values only are one group: add requests of "
                    "other wordings, or name a key of the rows that tells kinds of requests apart in group_by",
                )
            raise UsageError(
                f"no rows are left for {name} ({sizes}; read: {account.read.total()}; removed: {removed or 'none'})",
                where="data",
                fix="add rows or groups, raise data.split.test, or choose another data.split.seed",
            )
