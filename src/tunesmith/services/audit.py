"""What an audit asks for: the log with its anchors outside the store, and copies of a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import Field
from sqlalchemy import Text, cast, func, or_, select
from sqlalchemy.orm import Session

from tunesmith.core.clock import now, stamp
from tunesmith.core.digests import is_digest
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.text.names import is_number
from tunesmith.core.values import Omitted, Problem, View
from tunesmith.monitoring.erasure import resume
from tunesmith.registry.erasures import read_erasures
from tunesmith.registry.history import verify_log
from tunesmith.services.actions import Acting, Bare, Request, action
from tunesmith.store import audit, database
from tunesmith.store.anchoring import time_stamps
from tunesmith.store.anchoring.anchors import Anchor, AnchorsFound, open_place
from tunesmith.store.audit import Head, Pin
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.copying import (
    Contents,
    export_rows,
    import_rows,
    keys_of,
    open_archive,
    put_objects,
    require_no_rows,
    write_archive,
)
from tunesmith.store.locks import COPYING
from tunesmith.store.people.identities import acting, first_user, require, trusted_keys
from tunesmith.store.store import DATABASE, MARKER, Store
from tunesmith.store.tables import AuditRow
from tunesmith.store.uploads import without_bytes

_ANCHOR = "audit.anchor"


class AuditVerification(View):
    """Whether the log is unchanged. checked: number of entries; head: the newest entry, to be kept elsewhere.

    anchors: how many were compared. notes: what was not checked.
    """

    ok: bool
    checked: int
    problems: tuple[Problem, ...]
    head: Head
    anchors: int
    notes: tuple[str, ...]


class Anchored(View):
    """The newest entry, now kept at a place outside the store. written: False if nothing changed since the last anchor.

    kept_until: before this time nobody can remove it; without it, somebody who can write there can. stamped_at: the
    time that the time-stamping authority signed.
    """

    place: str
    store: str
    head: Head
    written: bool
    kept_until: Omitted[str] = None
    stamped_at: Omitted[str] = None


class AuditEntry(View):
    """One change: who did what to what, and when."""

    seq: int
    at: str
    actor: str
    action: str
    subject: str
    detail: JsonObject


class AuditLog(View):
    """The newest entries that were asked for. total: how many match, shown or not."""

    entries: tuple[AuditEntry, ...]
    total: int


class AnchorAudit(Request):
    """A place outside the store for the newest entry: a file, or s3://BUCKET/FOLDER in a bucket with Object Lock.

    keep_days: how long an object may not be removed. time_stamp: the URL of a time-stamping authority (RFC 3161) that
    signs the anchor; tsa_roots: its root certificates.
    """

    place: str
    keep_days: float = Field(default=3650, ge=1, le=36500)
    time_stamp: str | None = None
    tsa_roots: Path | None = None


@action(_ANCHOR, says="anchored the audit log", permission=_ANCHOR)
def anchor(acting: Acting, asked: AnchorAudit) -> Anchored:
    """Write the newest entry of the log to a place outside the store.

    Raises Refused, and writes nothing, if the place holds something that the log contradicts.
    """
    if (asked.time_stamp is None) != (asked.tsa_roots is None):
        raise UsageError(
            "a time stamp and its authority's roots go together", where="tsa_roots", fix="give both or none"
        )
    roots = None if asked.tsa_roots is None else time_stamps.load_roots(asked.tsa_roots)
    store, there = acting.store, open_place(asked.place, acting.store.root)
    with store.reading() as session:
        anchors = there.read()
        problems = audit.verify(session) + _place_problems(session, there.name, anchors)
        problems += audit.verify(session, _pins(there.name, anchors)) if not problems else []
        head, first = audit.newest(session), _first(session)
        newest = session.get(AuditRow, head.seq)
    if problems:
        fix = NextStep("nothing was written; compare log and anchors", "audit verify", anchor=(there.name,))
        raise Refused(problems[0], where=there.name, fix=fix)
    known = Anchored(place=there.name, store=first, head=head, written=False)
    if newest is not None and newest.action == _ANCHOR and newest.detail.get("place") == there.name:
        return known
    made = Anchor(store=first, seq=head.seq, digest=head.digest, at=stamp())
    stamped_at = None
    if asked.time_stamp is not None and roots is not None:
        token, signed = time_stamps.time_stamp(asked.time_stamp, made.statement, roots)
        made, stamped_at = made.model_copy(update={"time_stamp": token}), signed.isoformat()
    until = there.write(made, now() + timedelta(days=asked.keep_days))
    kept_until = None if until is None else until.isoformat()
    detail = {"place": there.name, "seq": head.seq, "digest": head.digest, "kept_until": kept_until}
    with store.change(acting.actor, _ANCHOR, "audit", detail) as session:
        require(session, acting.actor, _ANCHOR)
    return known.model_copy(update={"written": True, "kept_until": kept_until, "stamped_at": stamped_at})


@action("audit.verify", tokens=("read",), at="/audit/verification", whole=True, form=True, reads_files=True)
def verify(acting: Acting, _asked: Bare) -> AuditVerification:
    """Verify the audit log now: its own digests, signed records and the state that it describes."""
    return verify_audit(acting.store)


def verify_audit(
    store: Store, heads: Iterable[str] = (), anchors: Iterable[str] = (), tsa_roots: Path | None = None
) -> AuditVerification:
    """Compare the log with its own digests, with signed records and with the state that it describes.

    heads: entries that the caller kept elsewhere, as `12:sha256:...`. anchors: places that `anchor` wrote to.
    tsa_roots: root certificates; with them, each anchor needs a valid time stamp. Raises UsageError for text that is no
    entry.
    """
    pins = [Pin(witness="the head you gave", head=_head(text)) for text in heads]
    roots = None if tsa_roots is None else time_stamps.load_roots(tsa_roots)
    problems, notes, compared = list[Problem](), list[str](), 0
    for place in anchors:
        there = open_place(place, store.root)
        known = there.read()
        with store.reading() as session:
            reasons = _place_problems(session, there.name, known)
        if not known.anchors:
            reasons.append("there is no anchor here")
        if roots is not None:
            reasons += [reason for anchor in known.anchors for reason in _stamp_problems(anchor, roots)]
        elif unchecked := sum(bool(anchor.time_stamp) for anchor in known.anchors):
            notes.append(f"{unchecked} time stamps in {there.name} were not checked: give the authority's roots")
        problems += [Problem(path=there.name, reason=reason) for reason in reasons]
        pins += _pins(there.name, known)
        compared += len(known.anchors)
    problems += [Problem(path="audit log", reason=reason) for reason in verify_log(store, pins)]
    with store.reading() as session:
        newest = audit.newest(session)
        notes += [each.statement.noted for each in read_erasures(store.blobs, trusted_keys(session)).signed]
    return AuditVerification(
        ok=not problems,
        checked=newest.seq,
        problems=tuple(problems),
        head=newest,
        anchors=compared,
        notes=tuple(notes),
    )


def show_audit(
    store: Store,
    *,
    subject: str | None = None,
    action: str | None = None,
    containing: str = "",
    before: int | None = None,
    skip: int = 0,
    limit: int = 0,
) -> AuditLog:
    """The newest entries, oldest first. limit: how many; 0 for all.

    containing: only entries with this text in the name, the action, the subject or the detail. before: only entries
    with a smaller number. skip: leave out as many of the newest. `total` counts those that these two leave out, too.
    """
    wanted = [column == value for column, value in ((AuditRow.subject, subject), (AuditRow.action, action)) if value]
    if containing:
        columns = (AuditRow.actor, AuditRow.action, AuditRow.subject, cast(AuditRow.detail, Text))
        wanted.append(or_(*(column.icontains(containing, autoescape=True) for column in columns)))
    query = select(AuditRow).where(*wanted).order_by(AuditRow.seq.desc())
    if before is not None:
        query = query.where(AuditRow.seq < before)
    with store.reading() as session:
        rows = session.scalars(query.offset(skip).limit(limit) if limit else query).all()
        total = session.scalar(select(func.count()).select_from(AuditRow).where(*wanted)) or 0
    return AuditLog(entries=tuple(AuditEntry.of(row) for row in reversed(rows)), total=total)


def _head(text: str) -> Head:
    number, _, digest = text.partition(":")
    if not is_number(number) or not is_digest(digest):
        raise UsageError(f"{text[:100]!r} is not an entry", fix="write 12:sha256:..., as a check of the log prints it")
    return Head(seq=int(number), digest=digest)


def _first(session: Session) -> str:
    """What identifies a store: the digest of its log's first entry."""
    return session.scalar(select(AuditRow.digest).order_by(AuditRow.seq).limit(1)) or audit.GENESIS


def _pins(place: str, known: AnchorsFound) -> list[Pin]:
    return [Pin(witness=f"the anchor of {anchor.at} in {place}", head=anchor.head) for anchor in known.anchors]


def _place_problems(session: Session, place: str, known: AnchorsFound) -> list[str]:
    """What is wrong with a place: broken or foreign anchors, and missing ones that the log says were written there."""
    first, problems = _first(session), list(known.problems)
    for anchor in known.anchors:
        if anchor.store != first:
            problems.append(
                f"the anchor of {anchor.at} is of another store ({anchor.store[:19]}, this one is {first[:19]}), "
                "or the log was rewritten from its first entry"
            )
    held = {(anchor.seq, anchor.digest) for anchor in known.anchors}
    for row in session.scalars(select(AuditRow).where(AuditRow.action == _ANCHOR).order_by(AuditRow.seq)):
        detail = row.detail
        kept_until = detail.get("kept_until")
        over = kept_until is not None and str(kept_until) < now().isoformat()
        if detail.get("place") == place and (detail.get("seq"), detail.get("digest")) not in held and not over:
            problems.append(f"the anchor that entry {row.seq} says was written here is missing")
    return problems


def _stamp_problems(anchor: Anchor, roots: list[Any]) -> list[str]:
    if not anchor.time_stamp:
        return [f"the anchor of {anchor.at} has no time stamp"]
    try:
        time_stamps.check(anchor.time_stamp, anchor.statement, roots)
    except ValueError as error:
        return [f"the time stamp of the anchor of {anchor.at} is not valid: {error}"]
    return []


_ACTION = "store.copy"


class StoreCopy(View):
    """What was copied. bytes: of the objects (blobs, records, version files, trusted keys, cases, uploaded files).

    missing: ids of uploaded files whose bytes were gone. They stay listed, and whoever reads one gets told to upload it
    again. Empty for a backup, whose restore names them.
    """

    place: str
    objects: int
    bytes: int
    rows: int
    missing: tuple[str, ...] = ()


def backup(store: Store, file: Path, *, actor: str | None = None, progress: Progress = SILENT) -> StoreCopy:
    """Write database and objects into one new file. Private keys and work folders are not in it.

    Others may use the store meanwhile: the file holds one moment of the database, and every object that it names.
    Raises Refused for somebody who may not, and for an object whose bytes are not those that its key names.
    """
    user = acting(store, actor)
    require(store, user, _ACTION)
    with store.lock(COPYING, "backing up the store"):
        objects, total, rows = write_archive(store, file.absolute(), progress)
    with store.change(user, "store.backup", file.name, {"rows": rows, "objects": objects}):
        pass
    return StoreCopy(place=str(file), objects=objects, bytes=total, rows=rows)


def restore(store: Store, file: Path, *, actor: str | None = None, progress: Progress = SILENT) -> StoreCopy:
    """Fill an empty store from a file of backup. If the call is killed, the same one continues.

    Every byte of the file is compared with its digest before anything is written. actor: a user of the backup, by
    default its owner. What was erased since the backup is erased again, where the store's place holds the statements.
    Raises Refused for a damaged file, and for a store that holds something else.
    """
    whole = file.absolute()
    with _filling(store, "restore", str(whole)), store.scratch() as folder, open_archive(whole, folder) as contents:
        restored = _fill(store, contents, actor, "store.restore", file.name, progress)
    resume(store)
    return restored


def migrate(root: Path, *, actor: str | None = None, progress: Progress = SILENT) -> StoreCopy:
    """Copy the store in a folder to the database and the bucket of the environment. The folder stays as it is.

    root: a folder with SQLite and files. What the environment does not name is not copied: with a bucket alone, the
    database stays. If the call is killed, the same one continues. Raises UsageError where there is nothing to copy or
    no place to copy to, Refused for a place that holds something else.
    """
    source = Store(root, url=f"sqlite:///{root.absolute() / DATABASE}", blobs=LocalBlobs(root))
    target = Store(root)
    same_database, same_blobs = source.url == target.url, isinstance(target.blobs, LocalBlobs)
    if same_database and same_blobs:
        fix = "set TUNESMITH_DATABASE_URL=postgresql+psycopg://... or TUNESMITH_BLOBS_URL=s3://BUCKET/PREFIX, or both"
        raise UsageError("there is no place to copy to", where=str(root), fix=fix)
    if not (root / DATABASE).is_file():
        raise UsageError("there is no store in this folder", where=str(root), fix="name the project's folder with -C")
    of = database.store_id(source.engine)
    filling = _filling(target, "migrate", rows=not same_database)
    with filling, contextlib.ExitStack() as held, source.scratch() as folder:
        rows = None
        if not same_database:
            held.enter_context(source.writing())  # nobody changes the source until it is copied
            rows = folder / "database.jsonl"
            export_rows(source, rows)
        keys = [] if same_blobs else keys_of(source.blobs)
        contents = Contents(keys, source.blobs.pieces, rows, of)
        return _fill(target, contents, actor, "store.migrate", "store", progress, objects=not same_blobs)


@contextlib.contextmanager
def _filling(store: Store, verb: str, file: str = "", *, rows: bool = True) -> Iterator[None]:
    """Let nobody open a store until it is filled, also where this process is killed.

    rows: its database is filled, too. Raises Refused where that holds rows.
    """
    if new := not store.marker().store:
        store.mark(filling=verb, backup=file)
    try:
        with store.engine_to_fill().connect() as connection:
            if rows:
                require_no_rows(connection)
        yield
    except TunesmithError:
        if new and not store.marker().store:  # nothing was written
            store.blobs.delete(MARKER)
        raise


def _fill(
    store: Store,
    contents: Contents,
    actor: str | None,
    action: str,
    subject: str,
    progress: Progress,
    *,
    objects: bool = True,
) -> StoreCopy:
    """Objects first, then the rows and the audit entry in one transaction."""
    count, total = put_objects(store, contents, progress) if objects else (0, 0)
    kept = set(store.blobs.keys("files/"))
    with store.writing() as session:
        rows = 0 if contents.rows is None else import_rows(session, contents.rows)
        user = actor or os.environ.get("TUNESMITH_USER") or first_user(session) or ""
        require(session, user, _ACTION)
        missing = without_bytes(session, kept)
        detail = {"rows": rows, "objects": count, **({"missing": missing} if missing else {})}
        audit.append(session, actor=user, action=action, subject=subject, detail=detail)
        store.mark(filling="")  # a kill before the commit leaves files without a database, which may be filled, too
    place = store.engine.url.render_as_string(hide_password=True)
    return StoreCopy(place=place, objects=count, bytes=total, rows=rows, missing=tuple(missing))
