"""Deliveries that wait, in the database: derived from the audit log, tried again, and kept where none arrived.

Each webhook has a cursor into the audit log, the one place where each effect is recorded once. Entries after the cursor
become deliveries, and the cursor moves, in one transaction. A delivery that arrived is deleted afterwards: a process
that is killed in between sends it again, with the same id.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from tunesmith.store import audit
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow, DeliveryRow, WebhookRow
from tunesmith.webhooks.events import event_of

# Seconds until the next attempt, after the first failure, the second, ...: 8 attempts within about 29 hours.
DELAYS = (5.0, 60.0, 600.0, 3600.0, 10_800.0, 28_800.0, 61_200.0)
_JITTER = 0.2
_ENTRIES = 500  # audit entries looked at in one transaction
_TOGETHER = 20  # deliveries of one webhook sent in a row
_LISTED = 100


def note_events(store: Store, project: str, wanted: Mapping[str, Collection[str]], at: float) -> bool:
    """Add deliveries for the audit entries that are new; True where there may be more.

    wanted: the event types that each webhook asks for. A webhook that is new gets what happens from now on, and what
    waits for one that is no longer wanted is dropped. at: the time, in seconds since 1970.
    """
    with store.reading() as session:
        newest, known = audit.newest(session).seq, _cursors(session, project)
    if known.keys() == wanted.keys() and all(seq == newest for seq in known.values()):
        return False
    with store.writing() as session:
        names = list(wanted)
        session.execute(delete(DeliveryRow).where(DeliveryRow.project == project, DeliveryRow.webhook.not_in(names)))
        session.execute(delete(WebhookRow).where(WebhookRow.project == project, WebhookRow.name.not_in(names)))
        newest, known = audit.newest(session).seq, _cursors(session, project)
        for name in wanted.keys() - known.keys():
            session.add(WebhookRow(project=project, name=name, seq=newest))
        session.flush()
        first = min(known.values(), default=newest)
        entries = session.scalars(select(AuditRow).where(AuditRow.seq > first).order_by(AuditRow.seq).limit(_ENTRIES))
        last = first
        for entry in entries.all():
            last = entry.seq
            if (event := event_of(session, entry)) is None:
                continue
            for name, seq in known.items():
                if entry.seq > seq and event.type in wanted[name]:
                    place = {"project": project, "webhook": name, "seq": entry.seq, "due": at}
                    session.add(DeliveryRow(**place, event=event.id, type=event.type, body=event.body))
        behind = (WebhookRow.project == project, WebhookRow.seq < last)
        session.execute(update(WebhookRow).where(*behind).values(seq=last))
        return last < newest


def _cursors(session: Session, project: str) -> dict[str, int]:
    rows = session.execute(select(WebhookRow.name, WebhookRow.seq).where(WebhookRow.project == project))
    return {row.name: row.seq for row in rows}


def due(store: Store, project: str, webhooks: Collection[str], at: float) -> dict[str, Sequence[DeliveryRow]]:
    """The deliveries to be tried now, by webhook, oldest first."""
    queues = {}
    with store.reading() as session:
        for name in webhooks:
            mine = (DeliveryRow.project == project, DeliveryRow.webhook == name)
            waiting = select(DeliveryRow).where(*mine, DeliveryRow.given_up.is_(False), DeliveryRow.due <= at)
            if queue := session.scalars(waiting.order_by(DeliveryRow.seq).limit(_TOGETHER)).all():
                queues[name] = queue
    return queues


def record(store: Store, project: str, results: Mapping[DeliveryRow, str], at: float) -> None:
    """Delete deliveries that arrived ("" in results), and plan the next attempt of the others, or give them up."""
    with store.writing() as session:
        for delivery, problem in results.items():
            # Where another process tried it meanwhile, its result stands.
            same = (
                DeliveryRow.project == project,
                DeliveryRow.webhook == delivery.webhook,
                DeliveryRow.event == delivery.event,
                DeliveryRow.attempts == delivery.attempts,
            )
            if not problem:
                session.execute(delete(DeliveryRow).where(*same))
                continue
            last = delivery.attempts >= len(DELAYS)
            delay = 0.0 if last else DELAYS[delivery.attempts] * random.uniform(1 - _JITTER, 1 + _JITTER)
            values = {"attempts": delivery.attempts + 1, "given_up": last, "due": at + delay, "error": problem}
            session.execute(update(DeliveryRow).where(*same).values(values))


def count(store: Store, project: str) -> dict[tuple[str, bool], int]:
    """How many deliveries there are, by webhook and whether they were given up."""
    columns = (DeliveryRow.webhook, DeliveryRow.given_up)
    grouped = select(*columns, func.count()).where(DeliveryRow.project == project).group_by(*columns)
    with store.reading() as session:
        return {(webhook, ended): n for webhook, ended, n in session.execute(grouped)}


def failed(store: Store, project: str) -> Sequence[DeliveryRow]:
    """The newest deliveries that failed at least once, newest first."""
    query = select(DeliveryRow).where(DeliveryRow.project == project, DeliveryRow.error != "")
    with store.reading() as session:
        return session.scalars(query.order_by(DeliveryRow.seq.desc()).limit(_LISTED)).all()


def try_again(session: Session, project: str, webhook: str, at: float) -> int:
    """Begin anew with what failed, given up or not: try it at once; returns how many there are."""
    mine = (DeliveryRow.project == project, DeliveryRow.webhook == webhook, DeliveryRow.error != "")
    changed = session.execute(update(DeliveryRow).where(*mine).values(attempts=0, given_up=False, due=at))
    return int(changed.rowcount)  # type: ignore[attr-defined]
