"""`audit show|verify|anchor`, `backup`, `restore` and `migrate`: the log of every change, and copies of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, NotNegative, Terminal, add_commands, add_group, table
from tunesmith.core.digests import short

File = Annotated[Path, typer.Argument(help="The backup.")]
TsaRoots = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Root certificates (PEM) of the time-stamping authority.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(add_group(app, "audit", "The log of every change."), verify, anchor, show)
    add_commands(app, backup, restore, migrate)


def anchor(
    here: Acting,
    place: str,
    *,
    keep_days: Annotated[float, typer.Option(min=1, max=36500)] = 3650,
    time_stamp: str | None = None,
    tsa_roots: TsaRoots = None,
) -> None:
    """Write the newest entry of the log to a place outside the store, to notice an old store that is put back.

    place: A file, or s3://BUCKET/FOLDER in a bucket with Object Lock.
    keep_days: How long nobody can remove it from the bucket, in days.
    time_stamp URL: A time-stamping authority (RFC 3161) that signs the anchor.
    """
    here.show(services.audit.anchor, _draw_anchored)


def verify(
    here: Here,
    *,
    head: list[str] | None = None,
    anchor: list[str] | None = None,
    tsa_roots: TsaRoots = None,
) -> int:
    """Compare the audit log with itself, with signed records and with the current state. Exit 3 on any difference.

    head NUMBER:DIGEST: A newest entry that you kept elsewhere; repeatable.
    anchor PLACE: A place that `audit anchor` wrote to; repeatable.
    """
    verification = services.audit.verify_audit(here.store, head or (), anchor or (), tsa_roots)
    here.emit(verification, _draw_verification)
    return 0 if verification.ok else 3


def show(
    here: Here, subject: str | None = None, *, action: str | None = None, search: str = "", limit: NotNegative = 50
) -> None:
    """Show who did what, and when.

    subject: Only entries about this name or digest.
    action: Only this action, such as version.approve.
    search: Only entries with this text, the detail included.
    limit: Newest entries to show; 0 shows all.
    """
    log = services.audit.show_audit(here.store, subject=subject, action=action, containing=search, limit=limit)
    here.emit(log, _draw_log)


def backup(here: Acting, file: File) -> None:
    """Write the database and every object of the store into one new file. Private keys are not in it."""
    _show(here, "wrote", services.audit.backup(here.store, file, actor=here.actor, progress=Terminal()))


def restore(here: Acting, file: File) -> None:
    """Fill an empty store from a backup, after every byte of it was checked. Killed, it continues."""
    _show(here, "restored", services.audit.restore(here.store, file, actor=here.actor, progress=Terminal()))


def migrate(here: Acting) -> None:
    """Copy the store in .tunesmith to $TUNESMITH_DATABASE_URL and $TUNESMITH_BLOBS_URL. Killed, it continues.

    Stop what uses the store first. The folder stays as it is. Every object is read back and compared.
    """
    _show(here, "copied", services.audit.migrate(here.store.root, actor=here.actor, progress=Terminal()))


def _show(here: Acting, done: str, copy: services.audit.StoreCopy) -> None:
    sizes = f"{copy.rows:,} rows and {copy.objects:,} objects ({copy.bytes / 1e6:,.1f} MB)"
    gone = f"\nuploaded files whose bytes were gone already: {', '.join(copy.missing)}" if copy.missing else ""
    here.emit(copy, f"{done} {sizes}: {copy.place}{gone}")


def _draw_anchored(done: services.audit.Anchored) -> Drawn:
    what = "is written to" if done.written else "needs no new anchor: nothing happened since the last one in"
    yield f"entry {done.head.seq} {what} {done.place}"
    if done.kept_until is not None:
        yield f"nobody can remove it before {done.kept_until[:10]}"
    if done.stamped_at is not None:
        yield f"time-stamped at {done.stamped_at}"


def _draw_verification(verification: services.audit.AuditVerification) -> Drawn:
    for problem in verification.problems:
        yield problem.reason, "red"
    for note in verification.notes:
        yield note, "dim"
    outcome = "verifies" if verification.ok else f"does not verify: {len(verification.problems)} problems"
    yield f"the log of {verification.checked} entries {outcome}"
    newest = f"{verification.head.seq}:{verification.head.digest}"
    yield f"its newest entry, to be kept elsewhere: {newest}", "dim"


def _draw_log(log: services.audit.AuditLog) -> Drawn:
    rows = []
    for entry in log.entries:
        about = short(entry.subject) if entry.subject.startswith("sha256:") else entry.subject
        at = f"{entry.at[:19]}Z"  # to the second; --json has all of it
        rows.append((entry.seq, at, entry.actor, entry.action, about))
    yield table(rows, "entry", "at", "who", "action", "about")
    if len(log.entries) < log.total:
        shown = f"the newest {len(log.entries)} of {log.total}; --limit 0 shows all"
        yield shown, "dim"
