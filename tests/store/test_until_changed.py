"""Values are kept until any process changes the store."""

from __future__ import annotations

import itertools

from tunesmith.store import database
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.store import Store
from tunesmith.store.until_changed import UntilChanged


def test_a_value_is_kept_until_another_process_changes_the_store(store: Store) -> None:
    other = Store(store.root)
    owner = ensure_owner(store).name
    values, numbers = UntilChanged[int](store), itertools.count()

    def asked(key: str = "a") -> int:
        return values.get(key, lambda _session: next(numbers))

    assert [asked(), asked(), asked("b"), asked("b"), asked()] == [0, 0, 1, 1, 0]
    add_user(other, "ann", ["approver"], actor=owner)
    assert [asked(), asked(), asked("b")] == [2, 2, 3]
    with database.writing(store.engine):  # changes nothing
        pass
    assert asked() == 2


def test_a_value_that_does_not_hold_is_computed_again(store: Store) -> None:
    ensure_owner(store)
    values, numbers = UntilChanged[int](store), itertools.count()
    assert [values.get("a", lambda _session: next(numbers), lambda value: value > 1) for _ in range(4)] == [0, 1, 2, 2]


def test_what_a_computation_raises_is_not_kept(store: Store) -> None:
    ensure_owner(store)
    values, answers = UntilChanged[float](store), iter([0, 4])
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(values.get("a", lambda _session: 1 / next(answers)))
        except ZeroDivisionError:
            outcomes.append(None)
    assert outcomes == [None, 0.25]


def test_what_is_known_is_never_older_than_the_store(store: Store) -> None:
    values = UntilChanged[int](store)
    assert values.known("a") is None, "nothing was computed"
    values.get("a", lambda _session: 1)
    assert values.known("a") == 1
    assert values.known("a", lambda _value: False) is None
    with store.change("ann", "test", "a", {}):
        pass
    assert values.known("a") is None, "the store has changed"
