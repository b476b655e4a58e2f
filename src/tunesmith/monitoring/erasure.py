"""Erase the texts of rows: a person's, a source's, a licence's, those of one row.

A steward plans, and a second person confirms. An erasure is a recall first, so that nothing serves or builds on what
goes. `confirm` works out what is left of each blob and record, and signs a statement of what replaces what. From then
on the erasure is carried out, by whoever comes next if this process is killed: all other places first, the rows' own
blobs last, since they say which texts are looked for. Each step may be repeated.

A sentence that also stands in a row that stays is not looked for elsewhere: the plan names that row, and a person
decides about it. So what everybody writes, and labels and system prompts, stays where it is.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import stamp
from tunesmith.core.digests import digest_bytes, is_digest, short
from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.system.files import write_atomic
from tunesmith.core.system.scratch import remove_leftovers_below
from tunesmith.core.text.names import VersionRef
from tunesmith.core.values import View
from tunesmith.data.governance import erased as texts
from tunesmith.data.governance.erased import CUT, SHORTEST, Sentences
from tunesmith.data.review.queue import forget_cases, forget_items
from tunesmith.monitoring import traces
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry import erasures
from tunesmith.registry.erasures import CONFIRM, ErasureStatement, Replaced, Signed
from tunesmith.registry.holds import refuse_held
from tunesmith.rollout.controller import give_up
from tunesmith.store import database
from tunesmith.store.locks import ALONE, COPYING, LockHeld
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TrustedKey, signature_entry
from tunesmith.store.store import ERASURES, Store
from tunesmith.store.tables import ErasedRow, ErasureRow, FileRow, RecallRow, ReviewItemRow, Table

_LOG = logging.getLogger("tunesmith.erasure")
_LASTS = timedelta(hours=1)  # from stating what goes to its signature
_SHARED = ("cause", "reason", "planned_by", "confirmed_by", "at", "plan")  # by a plan's row and its statement
Sign = Callable[[JsonObject], bytes]  # a statement -> its envelope


class Plan(View):
    """What an erasure will do. state: planned, running, locked or done.

    rows: ids of what goes. others: rows that stay and hold a sentence of it: somebody has to decide about them. shared:
    sentences that are looked for nowhere, since they stand in those rows. trainings: names of those that learned from
    the rows; versions: of what was made from them. in_use: what has to end first. outside: files that the store does
    not hold and whose owners have to erase them too. kept_until: until when backups and logs of the database can bring
    the texts back. candidates: digests of what was made from them. locked: objects that the bucket does not delete yet,
    each with the time until which: then the erasure goes on. signed: by who planned it, as its second person needs.
    """

    number: int
    cause: str
    reason: str
    weights: traces.Weights
    state: str
    planned_by: str
    confirmed_by: str
    at: str
    rows: tuple[str, ...]
    places: tuple[traces.Place, ...]
    others: tuple[str, ...]
    shared: int
    trainings: tuple[str, ...]
    versions: tuple[str, ...]
    in_use: tuple[str, ...]
    outside: tuple[str, ...]
    kept_until: str
    candidates: tuple[str, ...] = ()
    locked: tuple[tuple[str, str], ...] = ()
    signed: bool = False

    @property
    def notices(self) -> list[str]:
        """What whoever confirms it has to know, a sentence each."""
        erased = "are deleted" if self.weights == "erase" else "stay, and do not forget"
        said = [] if self.signed or self.state != "planned" else [f"{self.planned_by} has to sign it first."]
        said += [f"{len(self.trainings)} trainings learned from the rows: their weights {erased}."]
        said += [f"{version} is retired." for version in self.versions]
        said += [f"In use by {user}: end it before you confirm." for user in self.in_use]
        said += [f"Not erased, and holds a sentence of it: row {row}." for row in self.others]
        if self.shared:
            said.append(f"{self.shared} sentences stand in those rows, too, and are looked for nowhere else.")
        said += [f"Erase it yourself: {file}." for file in self.outside]
        said += [f"The bucket does not delete {name} until {until}." for name, until in self.locked]
        return [*said, f"Backups, logs and replicas of the database keep it until: {self.kept_until}."]


class ErasurePlans(View):
    """The erasures of a store, the newest first."""

    erasures: tuple[Plan, ...]


def plan(
    store: Store,
    cause: Cause,
    *,
    reason: str,
    actor: str,
    weights: traces.Weights = "keep",
    kept_until: str = "",
    sign: Sign | None = None,
) -> Plan:
    """Write down everything that an erasure reaches. Changes nothing else.

    sign: gives the planner's envelope around the plan; None where they sign it afterwards, by `confirm`. weights:
    whether the weights that learned the rows are deleted, too. kept_until: until when backups, logs and replicas of the
    database are kept, as somebody who runs them says. Raises UsageError for a cause that no row here has, and for one
    that has no rows.
    """
    resume(store)
    found = traces.find(store, cause, weights)
    if not found.rows:
        raise UsageError(f"no dataset version in this store holds a row of {cause.label} any more")
    stated = {
        "weights": weights,
        "rows": sorted(found.rows),
        "places": [place.document() for place in traces.places_of(found.sized)],
        "others": sorted(found.others),
        "shared": len(found.shared),
        "trainings": [short(each) for each in found.of("training")],
        "versions": sorted(found.versions),
        "candidates": found.of("candidate"),
        "outside": sorted(found.outside),
        "kept_until": kept_until or "unknown",
    }
    detail: JsonObject = {"reason": reason, "weights": weights}
    with store.change(actor, "erase.plan", cause.label, detail) as session:
        identities.require(session, actor, "erase.plan")
        refuse_held(store, session, {one.digest for one in found.reached})
        there = (int(name) for key in store.blobs.keys(ERASURES) if (name := Path(key).stem).isdecimal())
        number = max((session.scalar(select(func.max(ErasureRow.id))) or 0, *there)) + 1
        row = ErasureRow(id=number, cause=cause.label, reason=reason, planned_by=actor, at=stamp(), plan=stated)
        detail |= {"erasure": number, "rows": len(found.rows)}
        if sign is not None:
            _sign_plan(store, session, row, sign, detail)
        session.add(row)
        session.flush()
    identities.publish_trust(store)
    return _shown(store, row)


def _stated_plan(row: ErasureRow) -> JsonObject:
    return erasures.plan_statement(row.id, row.cause, row.reason, row.planned_by, row.plan)


def _planner(row: ErasureRow, where: Store | Session) -> TrustedKey:
    """The key that signed a plan. Raises Refused where that does not count."""
    keys = identities.trusted_keys(where)
    return erasures.read_plan(row.id, row.cause, row.reason, row.planned_by, row.plan, keys)


def _sign_plan(store: Store, session: Session, row: ErasureRow, sign: Sign, detail: JsonObject) -> None:
    """Put the planner's signature into a plan. Raises Refused for one that does not count."""
    envelope = sign(_stated_plan(row))
    row.plan = {**row.plan, erasures.SIGNATURE: envelope.decode()}
    key = _planner(row, session)
    detail |= signature_entry(key.fingerprint, digest_bytes(envelope))


def list_erasures(store: Store) -> ErasurePlans:
    """The erasures of a store, the newest first."""
    with store.reading() as session:
        rows = list(session.scalars(select(ErasureRow).order_by(ErasureRow.id.desc())))
    return ErasurePlans(erasures=tuple(_shown(store, row) for row in rows))


def _row(store: Store, number: int) -> ErasureRow:
    with store.reading() as session:
        row = session.get(ErasureRow, number)
    if row is None:
        raise NotThere(f"there is no erasure {number}", fix=NextStep("list them", "erase list"))
    return row


def _shown(store: Store, row: ErasureRow) -> Plan:
    using = traces.in_use(store, row.plan.get("candidates", ())) if row.state == "planned" else ()
    stated = {name: value for name, value in row.plan.items() if name != erasures.SIGNATURE}
    return Plan.of(row, number=row.id, in_use=tuple(using), signed=erasures.SIGNATURE in row.plan, **stated)


def confirm(store: Store, number: int, *, actor: str, sign: Sign, at: str = "") -> Plan:
    """Recall what a plan names, have the statement of what goes signed, and erase it. By the planner: sign the plan.

    sign: gives the envelope around a statement. at: of the signature, where the statement was stated by `prepare`.
    Killed, the same call goes on, as does the next start of a server, a worker or a command. Raises Refused for the
    planner, while something uses the rows (the recall stands then), and where more is reached by now than the plan
    says, or than was signed.
    """
    row = _begin(store, number, actor)
    if row.planned_by == actor:
        detail: JsonObject = {"erasure": number}
        with store.change(actor, erasures.PLAN, row.cause, detail) as session:
            _sign_plan(store, session, session.get_one(ErasureRow, number), sign, detail)
        identities.publish_trust(store)
        return _shown(store, _row(store, number))
    with store.lock(COPYING, f"erasure {number}"), store.lock(ALONE, f"erasure {number}"):
        _resume(store)
        if _row(store, number).state == "planned":
            statement = _state(store, row, actor, at or stamp())
            envelope = sign(erasures.statement_of(statement))
            try:
                erasures.read_erasure(envelope, identities.trusted_keys(store), statement.key)
            except Refused as error:
                what = f"what {actor} signed is not what would be erased now: {error.what}"
                raise Refused(what, fix=NextStep("have it stated again", "erase confirm")) from error
            with store.writing() as session:  # nobody holds a version meanwhile
                refuse_held(store, session, statement.recalled)
                store.blobs.put(statement.key, envelope)
        _resume(store, now=True)
    return _shown(store, _row(store, number))


def prepare(store: Store, number: int, *, actor: str) -> JsonObject:
    """The statement to sign: for a plan's second person, of what goes, which is recalled first; for who planned it, of
    the plan. Raises as `confirm` does."""
    row = _begin(store, number, actor)
    if row.state != "planned":
        raise Refused(f"erasure {number} was signed by {row.confirmed_by} already")
    if row.planned_by == actor:
        return _stated_plan(row)
    return erasures.statement_of(_state(store, row, actor, stamp()))


def _begin(store: Store, number: int, actor: str) -> ErasureRow:
    """A plan that this person may sign. For its second person what it names is recalled by now, and nobody uses it.

    What refuses it for good is asked before the recall; who uses the rows after it, since it stops them.
    """
    row = _row(store, number)
    identities.require(store, actor, erasures.PLAN if row.planned_by == actor else CONFIRM).require_everything()
    if row.planned_by == actor:
        if erasures.SIGNATURE in row.plan:
            what = f"{actor} planned erasure {number} and cannot confirm it"
            raise Refused(what, fix=NextStep("have another steward or an admin confirm it", "erase confirm"))
    elif row.state == "planned":
        _planner(row, store)
        found = _found(store, row)
        with store.reading() as session:
            refuse_held(store, session, {one.digest for one in found.reached})
        reason = _reason(row.id, row.reason)
        if found.reached:
            cause = Cause.labelled(row.cause)
            for rollout in recall(store, cause, reason=reason, actor=actor).rollouts:
                give_up(store, rollout, f"recalled: {reason}")
        _check_unused(store, row)
    return row


def _check_unused(store: Store, row: ErasureRow) -> None:
    if using := traces.in_use(store, row.plan.get("candidates", ())):
        what = f"{using[0]} may use what erasure {row.id} deletes; it is recalled, and nothing is deleted yet"
        raise Refused(what, fix="wait for it or stop it, then confirm again")


def _state(store: Store, row: ErasureRow, actor: str, at: str) -> ErasureStatement:
    """What goes, as it is now; the same for the same store and time."""
    _check_unused(store, row)  # by now nobody begins: the lock of the erasure keeps them out
    if not stamp(-_LASTS) <= at <= stamp():
        raise Refused("what was to be signed is too old", fix=NextStep("have it stated again", "erase confirm"))
    found = _found(store, row)
    stated = {name: getattr(row, name) for name in _SHARED} | {"number": row.id, "confirmed_by": actor, "at": at}
    stated |= {"rows": sorted(found.rows), "recalled": sorted(one.digest for one in found.reached)}
    stated |= {"replaced": tuple(found.replaced.values()), "deleted": found.deleted, "entries": found.entries}
    stated["versions"] = found.versions if row.plan["weights"] == "erase" else {}
    return ErasureStatement.model_validate(stated)


def _found(store: Store, row: ErasureRow) -> traces.Found:
    """What a plan reaches now. Raises Refused where that is more than it names."""
    try:
        found = traces.find(store, Cause.labelled(row.cause), row.plan["weights"])
    except UsageError:  # another erasure took all of its rows since it was planned
        return traces.Found(set(), set(), set(), (), {}, {})
    known = {*row.plan["rows"], *row.plan["versions"]}
    if new := sorted({*found.rows, *found.versions} - known):
        what = f"{len(new)} rows or versions are reached that plan {row.id} does not name, such as {new[0]}"
        raise Refused(what, fix=NextStep("plan it again", "erase plan"))
    return found


def _reason(number: int, reason: str) -> str:
    """Why the records that an erasure reaches are recalled."""
    return f"erasure {number}: {reason}"


def _know(store: Store, signed: Signed) -> None:
    """Write a signed erasure into the database, which may have been put back since it was signed."""
    statement = signed.statement
    stated = {"erasure": statement.number, "rows": len(statement.rows), "versions": sorted(statement.versions)}
    detail: JsonObject = stated | signature_entry(signed.fingerprint, signed.digest)
    if signed.planner is not None:
        detail["plan"] = signature_entry(*signed.planner)["signature"]
    with store.change(statement.confirmed_by, CONFIRM, statement.cause, detail) as session:
        shared = {name: getattr(statement, name) for name in _SHARED}
        session.merge(ErasureRow(id=statement.number, state="running", statement=signed.digest, **shared))
        reason = _reason(statement.number, statement.reason)
        for digest in statement.recalled:
            if session.get(RecallRow, (digest, statement.cause)) is None:
                session.add(RecallRow(digest=digest, cause=statement.cause, reason=reason, at=statement.at))
        for one in statement.replaced:
            session.merge(ErasedRow(old=one.old, new=one.new))
    identities.publish_trust(store)


def resume(store: Store) -> None:
    """Go on with every erasure that is not done here, also where a backup brought back what was erased, and log it.

    What lies among the statements and does not count is logged and left where it is: `audit verify` names it, too. So
    is a statement by a key that a database which was put back does not know: once it is enrolled again, it counts.
    """
    if next(_open(store), None) is not None:
        with contextlib.suppress(LockHeld), store.lock(COPYING, "erasing"), store.lock(ALONE, "erasing"):
            _resume(store)


def _open(store: Store, *, now: bool = False) -> Iterator[tuple[Signed, bool, bool]]:
    """The erasures that are not done here, whether the database knows each, and whether it is to be carried out.

    now: also those that wait for a lock of the bucket to end.
    """
    read = erasures.read_erasures(store.blobs, identities.trusted_keys(store))
    for key, reason in read.problems.items():
        _LOG.warning("%s is no erasure that counts, and nothing is done about it: %s", store.blobs.where(key), reason)
    with store.reading() as session:
        rows = {row.statement: row for row in session.scalars(select(ErasureRow))}
    for signed in read.signed:
        row, replaced = rows.get(signed.digest), signed.statement.replaced
        due = row is None or any(store.blobs.exists(traces.key_of(one.kind, one.old)) for one in replaced if one.rows)
        if row is not None and row.state != "done":
            due = due or now or min((until for _, until in row.plan.get("locked", ())), default="") <= stamp()
        if due or not _cleaned(store, signed).exists():
            yield signed, row is not None, due


def _resume(store: Store, *, now: bool = False) -> None:
    for signed, known, _ in _open(store, now=now):
        if not known:  # all, before the first is carried out: a later one may have rewritten what an earlier one left
            _know(store, signed)
    for signed, _, due in _open(store, now=now):
        statement = signed.statement
        if due:
            _LOG.warning("erasure %d, which %s confirmed, is carried out", statement.number, statement.confirmed_by)
            _carry_out(store, statement)
        if not (cleaned := _cleaned(store, signed)).exists():
            _clean_machine(store, statement)
            write_atomic(cleaned, b"")


def _cleaned(store: Store, signed: Signed) -> Path:
    """A file that is there once this machine's own folders were cleaned after an erasure."""
    return store.local("erased", short(signed.digest))


def _clean_machine(store: Store, statement: ErasureStatement) -> None:
    """Delete what this machine derived from the rows: work folders, caches, keys of withdrawn rows."""
    for folder in traces.work_folders(store):
        shutil.rmtree(folder, ignore_errors=True)
    store.local("withdrawn.json").unlink(missing_ok=True)
    remove_leftovers_below(store.root)
    for key in (*statement.deleted, *(traces.key_of(one.kind, one.old) for one in statement.replaced)):
        store.blobs.delete(key)  # and the copy in the cache of a bucket
    if statement.versions:
        shutil.rmtree(store.local("cache", "folders"), ignore_errors=True)


def _carry_out(store: Store, statement: ErasureStatement) -> None:
    ids, cause = frozenset(statement.rows), Cause.labelled(statement.cause)
    rows = traces.Rows(store, ids, cause)
    wanted = Sentences(rows.sentences - rows.staying()[0])
    entries = traces.entries_with(store, wanted, ids, cause)
    with store.writing() as session:
        for name, table in traces.TABLES.items():
            _clean(session, table, {*statement.entries.get(name, ()), *entries.get(name, ())})
    until: dict[str, str] = {}  # an object -> the time until which the bucket locks it
    for key in {*statement.deleted, *(key for key, _ in traces.objects_with(store, wanted, cause))}:
        with store.writing() as session:
            forget_cases(session, [name := traces.object_name(key)])
            session.execute(delete(FileRow).where(FileRow.file == name))
        until[key] = store.blobs.erase(key)
    for label in statement.versions:
        store.drop_version(VersionRef.parse(label))
    # Rows last: they say which texts are looked for.
    for one in sorted(statement.replaced, key=lambda one: bool(one.rows)):
        key = traces.key_of(one.kind, one.old)
        if store.blobs.exists(key):
            _write_left(store, one)
        until[key] = store.blobs.erase(key)
    locked = [[store.blobs.where(key), when] for key, when in sorted(until.items()) if when]
    database.scrub(store.engine, sorted(traces.TABLES))
    state = "locked" if locked else "done"
    detail: JsonObject = {"erasure": statement.number}
    with store.change(statement.confirmed_by, f"erase.{state}", statement.cause, detail) as session:
        row = session.get_one(ErasureRow, statement.number)
        row.state, row.plan = state, {**row.plan, "locked": locked}


def _write_left(store: Store, one: Replaced) -> None:
    """Write what is left of a blob or record."""
    old, left = traces.key_of(one.kind, one.old), b""  # of weights
    if one.rows or one.cut:
        left = texts.rewritten(store.blobs.get(old), one.rows, one.cut, lines=one.kind == "blob")
    if digest_bytes(left) != one.new:
        what = f"{one.kind} {short(one.old)} is damaged: it does not give what the erasure left of it"
        raise Refused(what, where=store.blobs.where(old), fix="restore it from a backup")
    store.blobs.put(traces.key_of(one.kind, one.new), left)


def _clean(session: Session, table: type[Table], keys: Iterable[traces.Key]) -> None:
    """Delete rows of the database, or cut every longer text in them."""
    for row in filter(None, (session.get(table, tuple(key)) for key in sorted(keys, key=str))):
        if isinstance(row, ReviewItemRow):
            forget_items(session, [row.id])
        elif table in traces.DELETED:
            session.delete(row)
        else:
            for column in traces.text_columns(table):
                setattr(row, column, texts.with_texts(getattr(row, column), _without))


def _without(_place: str, text: str) -> str:
    return text if len(text) < SHORTEST or is_digest(text) else f"{CUT}]"
