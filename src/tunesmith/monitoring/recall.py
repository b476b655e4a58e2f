"""Recall a row, source, licence, subject, version or base, and everything that was made from it.

A recall reaches every record with a recalled one among its ancestors. A dataset version that holds one recalled row is
recalled as a whole, with the trainings, candidates, answers, evaluations, verdicts and versions made from it. That
holds even if the row is in a split that the training did not learn from, because the evidence uses it. A row and a
subject's rows are followed to their copies in all versions, and to what reviewers made of them. Records and blobs stay
in the store, so that the audit trail stays complete, but they are no longer served or built on. The review queue
forgets the rows.

Retrains that recalls left pending are names whose recalled champion no later version has replaced yet. Nothing is
queued. The list is computed each time from the recalls, the champions that the audit log names, and the registered
versions. So it cannot be lost or go stale, and an entry disappears when the retrained version serves. A version that
was recalled before it became champion leaves nothing pending.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Literal

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import Scope
from tunesmith.core.values import ScopedView, View
from tunesmith.data.dataset import read_lines
from tunesmith.data.documents import PASSAGES, Passage
from tunesmith.data.governance.licences import mentions
from tunesmith.data.governance.withdrawn import (
    ROW_CAUSES,
    TracedRows,
    load_withdrawn,
    reaches,
    recalled_values,
    same_name,
)
from tunesmith.data.review.queue import forget_items, items_of_rows
from tunesmith.models.weight_files import ADAPTER_FILE, MODEL_FILE
from tunesmith.records.candidate import BaseBody
from tunesmith.records.dataset import DocumentsBody
from tunesmith.records.version import VersionBody
from tunesmith.registry.approvals import check_may_serve
from tunesmith.registry.opening import recall_of
from tunesmith.registry.signing.release import read_version
from tunesmith.registry.versions import Version, get_alias
from tunesmith.rollout.state import live_rollout
from tunesmith.store.database import covering
from tunesmith.store.people.identities import require
from tunesmith.store.records import causes
from tunesmith.store.store import Store
from tunesmith.store.tables import (
    CHAMPION,
    LIVE,
    AliasRow,
    AuditRow,
    EdgeRow,
    RecallRow,
    RecordRow,
    RequestRow,
    RolloutRow,
    VersionRow,
)

CauseKind = Literal["row", "source", "licence", "subject", "tenant", "version", "base"]
_WEIGHTS = (ADAPTER_FILE, MODEL_FILE)
# What the recall of a version follows from its weights, and that of a base: to every candidate and version that uses
# them. Evaluations and verdicts are not reached, since they stay valid for the other candidates that they measured.
_BY_WEIGHTS = {"base": ("training", "candidate"), "training": ("candidate",), "candidate": ("version",)}
_LONGEST = 256  # characters of a cause's label: what the tables' columns hold


class Cause(View):
    """What to recall. value: a row's id, a source, licence, subject or tenant as its rows name it, or a record's
    digest."""

    kind: CauseKind
    value: str

    @classmethod
    def labelled(cls, label: str) -> Cause:
        """The cause with a label."""
        kind, _, value = label.partition(" ")
        return cls.model_validate({"kind": kind, "value": value})

    @property
    def label(self) -> str:
        """`licence CC-BY-NC-4.0`; of a source or subject its name in one spelling."""
        return f"{self.kind} {same_name(self.kind, self.value)}"


class Reached(View):
    """A record that a recall reaches. rows: of a dataset version, how many of its rows are recalled, by split."""

    kind: str
    digest: str
    label: str = ""
    rows: dict[str, int] = {}  # noqa: RUF012


class RecalledAlias(ScopedView):
    """An alias that points at a recalled version."""

    name: str
    alias: str
    version: str


class AnsweredRequests(ScopedView):
    """Requests of one tenant that a recalled version answered. first, last: the times of the first and last one."""

    version: str
    requests: int
    first: str
    last: str


class Recall(View):
    """What a recall reaches. done: False if nothing was changed. rollouts: numbers of live ones with a recalled arm.

    adapters: digests of the weights that were trained on it. tenants: those that a recalled version was made for or
    answered, or whose alias points at one. other_licences: expressions of rows and documents that contain a recalled
    licence but do not need it (`A OR B`), and were not recalled themselves: a person has to decide about them. near:
    names of other sources or subjects that may mean the same.
    """

    cause: str
    reason: str
    done: bool
    reached: tuple[Reached, ...]
    aliases: tuple[RecalledAlias, ...]
    rollouts: tuple[int, ...]
    adapters: tuple[str, ...] = ()
    served: tuple[AnsweredRequests, ...] = ()
    tenants: tuple[str, ...] = ()
    other_licences: tuple[str, ...] = ()
    near: tuple[str, ...] = ()

    @property
    def champions(self) -> tuple[RecalledAlias, ...]:
        """The aliases whose traffic stops."""
        return tuple(alias for alias in self.aliases if alias.alias == CHAMPION)


def recall(store: Store, cause: Cause, *, reason: str, actor: str, dry_run: bool = False) -> Recall:
    """Recall a cause and every record made from it, in one audited transaction.

    dry_run: change nothing, and return what a recall would reach. Live rollouts with a recalled arm abort when their
    controller runs next. A repeated recall adds the records that were made since. Raises UsageError if no record here
    was made from the cause, Refused if actor may not recall.
    """
    if not reason.strip():
        raise UsageError("a recall needs a reason", where="reason")
    if len(cause.label) > _LONGEST:
        raise UsageError(f"a {cause.kind} has at most {_LONGEST} characters, this one has {len(cause.value)}")
    require(store, actor, "recall.start")
    if dry_run:
        with store.reading() as session:
            return find_reached(store, session, cause, reason, done=False)[0]
    detail: JsonObject = {"reason": reason}
    with store.change(actor, "recall.start", cause.label, detail) as session:
        # Inside the transaction, so that no record which is being made from it now is missed.
        require(session, actor, "recall.start")
        recalled, items = find_reached(store, session, cause, reason, done=True)
        forget_items(session, items)
        at = stamp()
        for one in recalled.reached:
            if session.get(RecallRow, (one.digest, cause.label)) is None:
                session.add(RecallRow(digest=one.digest, cause=cause.label, reason=reason, at=at))
        detail |= recalled.model_dump(mode="json", include={"reached", "aliases", "rollouts", "adapters", "tenants"})
        return recalled


def reach(
    store: Store, session: Session, cause: Cause
) -> tuple[list[Reached], frozenset[str], tuple[str, ...], list[str]]:
    """(every record made from a cause, most without its name; the ids of its rows; licences that contain it; names near
    it). Raises UsageError where there is none."""
    reached, rows, licences, near = _roots(store, session, cause)
    if not reached:  # its rows may be erased
        marked = recalled_values(session, cause.kind).get(same_name(cause.kind, cause.value), ())
        reached = [Reached(kind=store.record(digest).kind, digest=digest) for digest in sorted(marked)]
    others = _other_licences(session, cause.value, licences)
    if not reached:
        only = f", only of {', '.join(others or near)}" if others or near else ""
        raise UsageError(
            f"no dataset version in this store holds a row of {cause.label}{only}",
            fix=NextStep("see a dataset version's sources and licences", "data show"),
        )
    digests, children = {root.digest for root in reached}, defaultdict[str, list[Reached]](list)
    edges = select(EdgeRow.parent, RecordRow.kind, EdgeRow.child).join(RecordRow, RecordRow.digest == EdgeRow.child)
    for parent, kind, child in session.execute(edges.order_by(EdgeRow.role, EdgeRow.child)):
        children[parent].append(Reached(kind=kind, digest=child))
    for one in reached:  # which grows meanwhile
        wanted = _BY_WEIGHTS.get(one.kind) if cause.kind in ("version", "base") else None
        for each in children[one.digest]:
            if each.digest not in digests and (wanted is None or each.kind in wanted):
                digests.add(each.digest)
                reached.append(each)
    return reached, rows, others, near


def find_reached(store: Store, session: Session, cause: Cause, reason: str, *, done: bool) -> tuple[Recall, list[int]]:
    """(every record made from a cause as the graph is now, the review items on its rows). Changes nothing.

    done: whether the caller marks the records.
    """
    made, rows, others, near = reach(store, session, cause)
    reached = [_labelled(store, one) for one in made]
    digests = {one.digest for one in reached}
    # A row has the same id before and after its licence is corrected, so the version counts from which it was queued.
    items = items_of_rows(session, rows, digests if cause.kind in ("source", "licence") else None)
    pointing = session.scalars(select(AliasRow).order_by(AliasRow.name, AliasRow.alias, AliasRow.tenant))
    aliases = tuple(RecalledAlias.of(row) for row in pointing if row.version in digests)
    live = session.scalars(select(RolloutRow).where(RolloutRow.status.in_(LIVE)))
    served = _served(session, digests)
    versions = [store.record(one.digest) for one in reached if one.kind == "version"]
    trained = [store.record(one.digest) for one in reached if one.kind == "training"]
    tenants = {VersionBody.of(one).tenant for one in versions}
    recalled = Recall(
        cause=cause.label,
        reason=reason,
        done=done,
        reached=tuple(reached),
        aliases=aliases,
        rollouts=tuple(row.id for row in live if row.canary in digests or row.stable in digests),
        adapters=tuple(sorted(one.blobs[name] for one in trained for name in _WEIGHTS if name in one.blobs)),
        served=served,
        tenants=tuple(sorted(tenants | {one.tenant for one in aliases} | {one.tenant for one in served})),
        other_licences=others,
        near=tuple(near),
    )
    return recalled, items


def _served(session: Session, digests: set[str]) -> tuple[AnsweredRequests, ...]:
    """The requests that recalled versions answered, counted from the server's records."""
    of = (RequestRow.tenant, RequestRow.region, RequestRow.version)
    query = select(*of, func.count(), func.min(RequestRow.at), func.max(RequestRow.at)).group_by(*of).order_by(*of)
    return tuple(
        AnsweredRequests(tenant=tenant, region=region, version=version, requests=count, first=first, last=last)
        for tenant, region, version, count, first, last in session.execute(query)
        if version in digests
    )


def _other_licences(session: Session, licence: str, stated: Collection[str]) -> tuple[str, ...]:
    """The stated expressions that contain a licence and are reached neither by its recall nor by an earlier one."""
    recalled = {licence, *recalled_values(session, "licence")} if stated else {licence}
    open_ = (each for each in stated if not any(reaches("licence", value, each) for value in recalled))
    return tuple(sorted(each for each in open_ if mentions(each, licence)))


def _roots(
    store: Store, session: Session, cause: Cause
) -> tuple[list[Reached], frozenset[str], Collection[str], list[str]]:
    """(the records that the cause names, or the dataset versions and documents that hold its rows; the rows' ids; for a
    licence, all expressions that rows and documents state; names near the cause's)."""
    if cause.kind == "version":
        record = store.record(cause.value, kind="version")
        training = store.record(record.parents["candidate"]).parents.get("training")
        named = {"version": cause.value, "training": training}
        roots = [Reached(kind=kind, digest=each) for kind, each in named.items() if each is not None]
        return roots, frozenset(), (), []
    if cause.kind == "base":
        base = BaseBody.read(store, cause.value)
        return [Reached(kind="base", digest=cause.value, label=base.spec)], frozenset(), (), []
    traced = TracedRows(store, store.records_of("dataset"), [cause.kind])
    ids = traced.trace(cause.kind, cause.value).ids
    roots = [
        Reached(kind="dataset", digest=digest, label=short(digest), rows=rows)
        for digest, rows in traced.reached(cause.kind, cause.value).items()
    ]
    licences = traced.licences()
    for digest in store.records_of("documents") if cause.kind != "subject" else ():
        body = DocumentsBody.read(store, digest)
        stated = [file.path for file in body.files] if cause.kind == "source" else [body.settings.licence]
        if cause.kind in ("tenant", "row"):
            passages = read_lines(store, store.record(digest), PASSAGES, Passage)
            stated = [passage.id if cause.kind == "row" else passage.labels.tenant for passage in passages]
        if any(reaches(cause.kind, cause.value, each) for each in stated):
            roots.append(Reached(kind="documents", digest=digest, label=short(digest)))
        if cause.kind == "licence":
            licences.update(filter(None, stated))
    return roots, ids, licences, traced.near(cause.kind, cause.value, recalled_values(session, cause.kind))


def _labelled(store: Store, one: Reached) -> Reached:
    label = one.label or short(one.digest)
    with contextlib.suppress(Refused):  # what was lost or damaged is recalled all the same
        record = store.record(one.digest)
        label = VersionBody.of(record).line if one.kind == "version" else str(record.body.get("name", "")) or label
    return one.model_copy(update={"label": label})


# What still uses the recalled records, and which versions replaced the recalled ones


class RecallStatus(View):
    """Whether nothing uses what was recalled any more. left: what still has to be done, one line each.

    retrain: names of recalled versions without a replacement. replaced: name -> the newest version made without it.
    other_licences, near: see Recall; they do not count as what is left.
    """

    cause: str
    gone: bool
    left: tuple[str, ...]
    retrain: tuple[str, ...]
    replaced: Mapping[str, str]
    other_licences: tuple[str, ...] = ()
    near: tuple[str, ...] = ()


def recall_status(store: Store, cause: Cause) -> RecallStatus:
    """The status of a recall, from the graph of records as it is now.

    Gone: every record made from the cause is marked as recalled, no alias points at one, no live rollout has one as an
    arm, the review queue does not hold its rows, and the next build leaves them out. Raises UsageError if the cause was
    never recalled.
    """
    with store.reading() as session:
        marked = recalled_values(session, cause.kind).get(same_name(cause.kind, cause.value))
        if not marked:
            raise UsageError(
                f"{cause.label} was never recalled in this store",
                fix=NextStep("recall it", "recall", reason=..., **{cause.kind: cause.value}),
            )
        recall, items = find_reached(store, session, cause, reason="", done=False)
        since = [one for one in recall.reached if one.digest not in marked]
        left = [f"{one.kind} {one.label} was made from it since: recall it again" for one in since]
        left += [f"{one.name}@{one.alias}{one.scope.said} still points at it" for one in recall.aliases]
        left += [f"rollout {number} still has an arm of it" for number in recall.rollouts]
        if items:
            left.append(f"the review queue holds its text (items: {len(items)}): recall it again")
        names = {VersionBody.read(store, one.digest).name for one in recall.reached if one.kind == "version"}
        left_over = {name: newest_left(store, session, name) for name in sorted(names)}
    newest = {name: version.label for name, version in left_over.items() if version is not None}
    if cause.kind in ROW_CAUSES:
        withdrawn = load_withdrawn(store)
        if not withdrawn.names(cause.kind, cause.value):
            left.append("the next build would include its rows again")
    return RecallStatus.of(
        recall,
        gone=not left,
        left=tuple(left),
        retrain=tuple(sorted(names - newest.keys())),
        replaced=newest,
    )


# Retrains that recalls left pending


_Place = tuple[str, Scope]  # a name, and for whom


class PendingRetrain(ScopedView):
    """A name, for a tenant and region, whose champion was recalled. version: the newest recalled champion.

    causes: of its recalls. serves: the version that is champion now, "" for none. answers: whether that one may be
    loaded. replacement: a later version that was made without what was recalled but is not champion yet. next: what
    to do, in order.
    """

    name: str
    version: str
    causes: tuple[str, ...]
    serves: str
    answers: bool
    replacement: str | None
    next: tuple[NextStep, ...]


def list_pending_retrains(store: Store, name: str | None = None) -> list[PendingRetrain]:
    """Pending retrains of one name, or of all, in the order of names, tenants and regions. Changes nothing."""
    with store.reading() as session:
        by_cause = causes(session)
        if not by_cause:
            return []
        places = _champions(session)
        pending = [
            _pending(store, session, place, places[place], by_cause)
            for place in sorted(places)
            if name in (None, place[0])
        ]
    return [one for one in pending if one is not None]


def _champions(session: Session) -> dict[_Place, set[str]]:
    """Digests of every version that ever was champion, by place, from the audit log."""
    places: dict[_Place, set[str]] = {}
    for row in session.scalars(select(AuditRow).where(AuditRow.action == "alias.set").order_by(AuditRow.seq)):
        if row.detail["alias"] == CHAMPION and row.detail["version"]:
            place = (row.detail["name"], Scope(row.detail["tenant"], row.detail["region"]))
            places.setdefault(place, set()).add(row.detail["version"])
    return places


def _pending(
    store: Store, session: Session, place: _Place, champions: set[str], by_cause: dict[str, list[str]]
) -> PendingRetrain | None:
    name, scope = place
    recalled = [each for each in (_read(store, digest) for digest in champions) if recall_of(session, *each)]
    if not recalled:
        return None
    last, statement = max(recalled, key=lambda each: each[0].number)
    alias = get_alias(session, name, scope)
    now = None if alias is None else _read(store, alias.version)
    answers = now is not None and recall_of(session, *now) is None
    if now is not None and answers and now[0].number > last.number:
        return None
    later = VersionRow.number > last.number
    replacement = newest_left(store, session, name, later, *covering(VersionRow, scope))
    by = _causes(last, statement, by_cause)
    return PendingRetrain(
        name=name,
        **scope.fields(),
        version=last.label,
        causes=tuple(by),
        serves=now[0].label if now else "",
        answers=answers,
        replacement=replacement.label if replacement else None,
        next=tuple(_next(store, session, place, by, replacement)),
    )


def newest_left(store: Store, session: Session, name: str, *conditions: ColumnElement[bool]) -> Version | None:
    """The newest version of a name, under these conditions, that was made from nothing recalled."""
    query = select(VersionRow.digest).where(VersionRow.name == name, *conditions).order_by(VersionRow.number.desc())
    read = (_read(store, digest) for digest in session.scalars(query))
    return next((version for version, statement in read if recall_of(session, version, statement) is None), None)


def _read(store: Store, digest: str) -> tuple[Version, VersionBody]:
    return read_version(store.record(digest, kind="version"), short(digest))


def _causes(version: Version, statement: VersionBody, by_cause: dict[str, list[str]]) -> list[str]:
    """The recalls that reached a version. Those of another version and of a base reach it only through its weights."""
    own = {version.digest, version.candidate, statement.base}
    everything = {*own, *statement.records, *statement.blobs}
    return [
        cause
        for cause, digests in by_cause.items()
        if not (own if cause.startswith(("version ", "base ")) else everything).isdisjoint(digests)
    ]


def _next(store: Store, session: Session, place: _Place, by: list[str], replacement: Version | None) -> list[NextStep]:
    name, scope = place
    if replacement is None:
        kinds = {cause.partition(" ")[0] for cause in by}
        change = "name another `base`" if "base" in kinds else "change the rows or settings"
        # The next build leaves recalled rows out. It does not replace a base, or what a recalled version was made from.
        changes = [NextStep(f"{change} in tunesmith.yaml")] if kinds & {"base", "version"} else []
        return [*changes, NextStep("build, train and measure again", "run")]
    rollout = live_rollout(session, name, scope)
    if rollout is not None and rollout.canary == replacement.digest:
        return [NextStep("see how its rollout goes", "rollout status")]
    label = replacement.label
    steps = [NextStep(f"start a rollout of {label}", "rollout start", version=label, **scope.fields())]
    try:
        check_may_serve(session, store, replacement, scope)
    except Refused:
        steps.insert(0, NextStep(f"have {label} approved", "approve", version=label, actor=..., reason=...))
    return steps
