"""The audit log, by attack on the chain itself. What needs versions and approvals as witnesses is in tests/registry."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, func, select, text, update

from tests.forked import forkserver
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.store import audit, database
from tunesmith.store.audit import Head, Pin
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditHeadRow, AuditRow, MemoRow


def write(store: Store, count: int, actor: str = "olive") -> None:
    for number in range(count):
        with store.change(actor, "memo.keep", f"key-{actor}-{number}", {"number": number}) as session:
            session.merge(MemoRow(key=f"key-{actor}-{number}", digest="x"))


def problems(store: Store, *pins: Pin) -> list[str]:
    with database.reading(store.engine) as session:
        return audit.verify(session, pins)


def execute(store: Store, statement: str) -> None:
    with database.writing(store.engine) as session:
        session.execute(text(statement))


def test_a_cut_tail_shows(store: Store) -> None:
    write(store, 5)
    execute(store, "delete from audit where seq > 3")
    assert problems(store) == ["entry 5, which the log's head names, is missing: the tail was cut"]
    execute(store, "delete from audit")
    assert problems(store) == ["entry 5, which the log's head names, is missing: the tail was cut"]


def test_a_log_rewritten_wholesale_shows_by_its_head(store: Store) -> None:
    write(store, 5)
    with database.writing(store.engine) as session:
        session.execute(delete(AuditRow))
        session.flush()
        for number in range(5):
            audit.append(session, actor="olive", action="memo.keep", subject=f"key-{number}", detail={"forged": True})
    assert problems(store) == [
        "entry 5 is not the one that the log's head names: the log was rewritten",
    ]


def test_reordered_entries_show(store: Store) -> None:
    write(store, 5)
    execute(store, "update audit set seq = 99 where seq = 2")
    execute(store, "update audit set seq = 2 where seq = 3")
    execute(store, "update audit set seq = 3 where seq = 99")
    found = problems(store)
    assert "entry 2 does not follow entry 1" in found
    assert "entry 2 was changed after it was written" in found


def test_a_missing_entry_in_the_middle_shows(store: Store) -> None:
    write(store, 5)
    execute(store, "delete from audit where seq = 3")
    assert problems(store) == ["entry 3 is missing: the next one is numbered 4"]


@pytest.mark.parametrize(
    "change",
    ["actor = 'eve'", "action = 'x'", "subject = 'x'", "at = '2001'", "detail = '{}'", "detail = '{\"a\": NaN}'"],
)
def test_every_column_is_covered(store: Store, change: str) -> None:
    write(store, 3)
    execute(store, f"update audit set {change} where seq = 2")  # noqa: S608
    assert problems(store) == ["entry 2 was changed after it was written"]


def test_an_entry_changed_with_its_digest_breaks_the_chain(store: Store) -> None:
    write(store, 3)
    with database.writing(store.engine) as session:
        row = session.get_one(AuditRow, 2)
        row.actor = "eve"
        row.digest = audit._digest(row)
    assert problems(store) == ["entry 3 does not follow entry 2"]


def test_detail_that_is_not_even_json_is_reported_not_raised(store: Store) -> None:
    write(store, 3)
    execute(store, "update audit set detail = '{broken' where seq = 2")
    found = problems(store)
    assert found[0].startswith("an entry after 0 cannot be read")


def test_a_missing_head_is_reported_and_stays_missing(store: Store) -> None:
    write(store, 2)
    execute(store, "delete from audit_head")
    write(store, 1, actor="ann")
    assert problems(store) == ["the log's head is missing, so a cut tail would not show"]


def test_the_next_entry_does_not_hide_a_cut_tail(store: Store) -> None:
    write(store, 5)
    execute(store, "delete from audit where seq > 3")
    write(store, 1, actor="ann")
    assert problems(store) == ["entry 5, which the log's head names, is missing: the tail was cut"]
    write(store, 1, actor="bob")
    assert problems(store) == ["entry 5 is not the one that the log's head names: the log was rewritten"]


def test_a_pin_kept_elsewhere_is_a_witness(store: Store) -> None:
    write(store, 3)
    with database.reading(store.engine) as session:
        head = audit.newest(session)
    assert (
        problems(store, Pin(witness="a note", head=head), Pin(witness="birth", head=Head(seq=0, digest=audit.GENESIS)))
        == []
    )
    other = Head(seq=2, digest=head.digest)
    assert problems(store, Pin(witness="a note", head=other)) == [
        "entry 2 is not the one that a note names: the log was rewritten, or an old copy was put back and used"
    ]


def _write_in_a_process(root: Path, url: str, actor: str) -> None:
    write(Store(root, url), 10, actor)


def test_two_processes_write_one_chain(store: Store) -> None:
    write(store, 1)
    given = (store.root, store.engine.url.render_as_string(hide_password=False))
    workers = [forkserver().Process(target=_write_in_a_process, args=(*given, actor)) for actor in ("ann", "bob")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert problems(store) == []
    with database.reading(store.engine) as session:
        assert audit.newest(session).seq == 21
        assert session.scalar(select(AuditHeadRow.seq)) == 21


def test_on_a_full_disk_the_action_does_not_happen(store: Store) -> None:
    write(store, 1)

    def limit(connection: object, _record: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]  # lowered to what is in use

    store.engine.dispose()
    event.listen(store.engine, "connect", limit)
    detail = {"much": "x" * 500_000}
    with (
        pytest.raises(TunesmithError, match="full"),
        store.change("olive", "memo.keep", "key", detail) as session,
    ):
        session.execute(update(MemoRow).values(digest="changed"))
    event.remove(store.engine, "connect", limit)
    store.engine.dispose()
    with database.reading(store.engine) as session:
        assert session.scalar(select(MemoRow.digest)) == "x"
        assert session.scalar(select(func.count()).select_from(AuditRow)) == 1
    assert problems(store) == []


def test_a_change_that_fails_leaves_no_entry(store: Store) -> None:
    write(store, 1)
    with pytest.raises(ZeroDivisionError), store.change("olive", "memo.keep", "key", {}) as session:
        session.merge(MemoRow(key="key", digest=str(1 // 0)))
    for detail in ({"a": float("nan")}, {"a": 2**60}, {"a": "\ud800"}):
        with pytest.raises(UsageError), store.change("olive", "memo.keep", "key", detail) as session:
            session.merge(MemoRow(key="key", digest="x"))
    with database.reading(store.engine) as session:
        assert session.get(MemoRow, "key") is None
        assert audit.newest(session).seq == 1


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(detail=st.dictionaries(TEXT, JSON, max_size=4))
def test_any_json_survives_the_way_through_the_database(store: Store, detail: dict[str, object]) -> None:
    with store.change("olive", "memo.keep", "key", detail):
        pass
    assert problems(store) == []
