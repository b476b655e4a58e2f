"""The audit log, by attack: someone who can write the whole database."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from tunesmith.registry.history import verify_log
from tunesmith.registry.versions import Version
from tunesmith.store import audit
from tunesmith.store.people import identities, tokens
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditHeadRow, AuditRow, RecordRow, TokenRow, UserRow, VersionRow


def rewrite(store: Store, change: dict[int, dict[str, Any]], keep: int | None = None) -> None:
    """Write the log again from some entries, whole in itself, and its head with it."""
    with store.reading() as session:
        old = [
            {"actor": row.actor, "action": row.action, "subject": row.subject, "detail": row.detail}
            for row in audit.entries(session)
        ][:keep]
    with store.writing() as session:
        session.execute(delete(AuditRow))
        session.execute(delete(AuditHeadRow))
        session.flush()
        for number, entry in enumerate(old, start=1):
            audit.append(session, **{**entry, **change.get(number, {})})


def test_a_rewritten_log_contradicts_signed_heads(store: Store, version: Version) -> None:
    with store.reading() as session:
        head = audit.newest(session)
    pins = [audit.Pin(witness="the head you gave", head=head)]
    assert verify_log(store, pins) == []
    rewrite(store, {}, keep=head.seq - 1)
    assert any("the head you gave" in problem for problem in verify_log(store, pins)), "the newest entry is missing"
    rewrite(store, {2: {"actor": "someone-else"}})
    with store.reading() as session:
        assert audit.verify(session) == []  # it is whole and reaches its head: the trap
    assert any("the log was rewritten" in problem and "version" in problem for problem in verify_log(store))
    with store.writing() as session:  # the folders of versions name it too
        session.execute(delete(RecordRow))
    assert any("the log was rewritten" in problem and "version" in problem for problem in verify_log(store))


def test_what_was_changed_behind_the_logs_back_shows(store: Store, version: Version) -> None:
    for name in ("ci", "other"):
        tokens.issue_token(store, "ann", actor="ann", name=name, scopes=["chat"], expires=9e9)
        tokens.revoke_token(store, "ann", name, actor="olive")
    with store.writing() as session:
        session.execute(update(TokenRow).values(used=5.0))
    assert verify_log(store) == []
    state = {"scopes": ["all"], "expires": None, "created": 7.0, "revoked": None}
    user = {"roles": ["admin", "approver"], "tenant": "acme", "active": False}
    with store.writing() as session:
        session.execute(update(UserRow).where(UserRow.name == "ann").values(**user))
        session.execute(update(TokenRow).where(TokenRow.name == "ci").values(**state))
        session.execute(update(TokenRow).where(TokenRow.name == "other").values(digest="sha256:" + "0" * 64))
    assert verify_log(store) == [
        "token ci of ann differs between the log and the database: created, expires, revoked, scopes",
        "token other of ann differs between the log and the database: token",
        "user ann differs between the log and the database: active, roles, tenant",
    ]


def test_rows_slipped_in_or_taken_out_show(store: Store, version: Version) -> None:
    tokens.issue_token(store, "ann", actor="ann")
    with store.writing() as session:
        session.execute(delete(TokenRow))
        session.add(TokenRow(digest="sha256:x", user="ann", name="mine", scopes=["all"], created=1.0))
        session.add(UserRow(name="mallory", roles=["admin"], tenant="", region="", groups=[], active=True))
        session.add(VersionRow(name="intents", number=9, digest="sha256:" + "0" * 64, key=""))
        session.execute(delete(UserRow).where(UserRow.name == "ann"))
    assert verify_log(store) == [
        "token first of ann is in the log but not in the database",
        "token mine of ann is in the database but not in the log",
        "user ann is in the log but not in the database",
        "user mallory is in the database but not in the log",
        "version intents@v9 is in the database but not in the log",
    ]


def test_what_is_gone_is_said_to_be(store: Store, version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(store.record_where(version.digest)).unlink()
    assert any("cannot be compared with the log" in problem for problem in verify_log(store))
    with store.writing() as session:
        session.execute(delete(UserRow))
    monkeypatch.setenv("TUNESMITH_USER", "mallory")
    with pytest.raises(Exception, match="there is no user"):  # an emptied table makes nobody the owner
        identities.acting(store)
    with store.reading() as session:
        assert session.scalars(select(UserRow)).all() == []
