"""The owner of the store, olive, and a clock that tests set."""

import pytest
from sqlalchemy.orm import Session

from tunesmith.jobs import queue
from tunesmith.store.people import identities
from tunesmith.store.store import Store


class SetClock:
    """Tells the time that it was set to."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self, _session: Session) -> float:
        return self.at


@pytest.fixture
def olive(store: Store) -> None:
    identities.ensure_owner(store)


@pytest.fixture
def clock(olive: None, monkeypatch: pytest.MonkeyPatch) -> SetClock:
    monkeypatch.setattr(queue, "database_time", clock := SetClock())
    return clock
