"""The audit log, by attack on the chain itself. What needs versions and approvals as witnesses is in tests/registry."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, select, text

from tests.forked import forkserver
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.store import audit
from tunesmith.store.audit import Head, Pin
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditHeadRow, AuditRow, MemoRow


def write(store: Store, count: int, actor: str = "olive") -> None:
    for number in range(count):
        with store.change(actor, "memo.keep", f"key-{actor}-{number}", {"number": number}) as session:
            session.merge(MemoRow(key=f"key-{actor}-{number}", digest="x"))


def problems(store: Store, *pins: Pin) -> list[str]:
    with store.reading() as session:
        return audit.verify(session, pins)


CUT = "entry 5, which the log's head names, is missing: the tail was cut"
CHANGED = "entry 2 was changed after it was written"
REWRITTEN = "entry 5 is not the one that the log's head names: the log was rewritten"
HEADLESS = "the log's head is missing, so a cut tail would not show"


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("delete from audit where seq > 3", [CUT]),
        ("delete from audit", [CUT]),
        ("delete from audit where seq = 3", ["entry 3 is missing: the next one is numbered 4"]),
        ("delete from audit_head", [HEADLESS]),
        ("update audit set actor = 'eve' where seq = 2", [CHANGED]),
        ("update audit set action = 'x' where seq = 2", [CHANGED]),
        ("update audit set subject = 'x' where seq = 2", [CHANGED]),
        ("update audit set at = '2001' where seq = 2", [CHANGED]),
        ("update audit set detail = '{\"a\": NaN}' where seq = 2", [CHANGED]),
        ("update audit set detail = '{broken' where seq = 2", ["an entry after 0 cannot be read", CUT]),
        ("update audit set seq = 6 where seq = 5", ["entry 5 is missing: the next one is numbered 6",
                                                    "entry 6 was changed after it was written", CUT]),
    ],
)  # fmt: skip
def test_a_log_that_was_touched_says_where(store: Store, statement: str, found: list[str]) -> None:
    write(store, 5)
    with store.writing() as session:
        session.execute(text(statement))
    assert [one.partition(": Expecting")[0] for one in problems(store)] == found
    if found == [HEADLESS]:
        write(store, 1, actor="ann")
        assert problems(store) == [HEADLESS], "it is not written anew"


def test_an_entry_with_a_new_digest_shows_by_the_next_one(store: Store) -> None:
    write(store, 5)
    with store.writing() as session:
        row = session.get_one(AuditRow, 2)
        row.actor = "eve"
        row.digest = audit._digest(row)
    assert problems(store) == ["entry 3 does not follow entry 2"]


def test_the_next_entry_does_not_hide_a_cut_tail(store: Store) -> None:
    write(store, 5)
    with store.writing() as session:
        session.execute(delete(AuditRow).where(AuditRow.seq > 3))
    write(store, 1, actor="ann")
    assert problems(store) == [CUT]
    write(store, 1, actor="bob")
    assert problems(store) == [REWRITTEN]


def test_a_pin_kept_elsewhere_is_a_witness(store: Store) -> None:
    write(store, 3)
    with store.reading() as session:
        head = audit.newest(session)
    birth = Pin(witness="birth", head=Head(seq=0, digest=audit.GENESIS))
    assert problems(store, Pin(witness="a note", head=head), birth) == []
    assert problems(store, Pin(witness="a note", head=Head(seq=2, digest=head.digest))) == [
        "entry 2 is not the one that a note names: the log was rewritten, or an old copy was put back and used"
    ]


def _write_in_a_process(root: Path, url: str, actor: str) -> None:
    write(Store(root, url), 10, actor)


def test_two_processes_write_one_chain(store: Store) -> None:
    write(store, 1)
    url = store.engine.url.render_as_string(hide_password=False)
    workers = [
        forkserver().Process(target=_write_in_a_process, args=(store.root, url, actor)) for actor in ("ann", "bob")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert problems(store) == []
    with store.reading() as session:
        assert audit.newest(session).seq == session.scalar(select(AuditHeadRow.seq)) == 21


def test_a_change_that_fails_leaves_no_entry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, 1)
    with pytest.raises(ZeroDivisionError), store.change("olive", "memo.keep", "key", {}) as session:
        session.merge(MemoRow(key="key", digest=str(1 // 0)))
    for detail in ({"a": float("nan")}, {"a": 2**60}, {"a": "\ud800"}):
        with pytest.raises(UsageError), store.change("olive", "memo.keep", "key", detail) as session:
            session.merge(MemoRow(key="key", digest="x"))

    def limit(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # lowered to what is in use

    store.engine.dispose()
    event.listen(store.engine, "connect", limit)
    much = {"much": "x" * 500_000}
    with pytest.raises(TunesmithError, match="full"), store.change("olive", "memo.keep", "key", much) as session:
        session.merge(MemoRow(key="key", digest="x"))
    event.remove(store.engine, "connect", limit)
    store.engine.dispose()
    with store.reading() as session:
        assert session.get(MemoRow, "key") is None
        assert audit.newest(session).seq == 1
    assert problems(store) == []


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
