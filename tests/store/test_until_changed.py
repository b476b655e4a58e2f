"""Values are kept until any process changes the store."""

import itertools

import pytest

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
    with store.writing():  # changes nothing
        pass
    assert asked() == 2
    assert (values.kept("a"), values.kept("c")) == (2, None)


def test_a_value_that_does_not_hold_is_computed_again(store: Store) -> None:
    values, numbers, least = UntilChanged[float](store, lambda value: value > least), itertools.count(), 2
    assert values.known("a") is None, "nothing was computed"
    with pytest.raises(ZeroDivisionError):
        values.get("a", lambda _session: 1 / next(numbers))
    assert [values.get("a", lambda _session: next(numbers)) for _ in range(4)] == [1, 2, 3, 3]
    for least in (3, 2):
        assert values.known("a") == (3 if least == 2 else None)
    with store.change("ann", "test", "a", {}):
        pass
    assert values.known("a") is None, "the store has changed"
