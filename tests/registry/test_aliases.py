"""The champion changes by compare-and-set alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from tests.fabricate import Chain, approve, put_chain
from tunesmith.core.clock import stamp
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.registry.aliases import ALIASES, Alias, get_alias, list_aliases, revision_of, set_alias
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.versions import Version
from tunesmith.store import database
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, RecallRow


def point(store: Store, version: Version | None, expected: int, **place: Any) -> Alias:
    """Under an override: these tests are about the alias, not about approvals."""
    where = {"name": "intents", "alias": "champion", "override_by": "olive", **place}
    with store.change("olive", "test.point", "intents", {}) as session:
        return set_alias(session, version=version, expected=expected, actor="olive", **where)


def test_an_alias_points_at_one_version_and_knows_its_revision(store: Store, version: Version) -> None:
    assert get_alias(store, "intents", "champion") is None
    assert point(store, version, 0).revision == 1
    found = get_alias(store, "intents", "champion")
    assert found is not None
    assert (found.version, found.revision) == (version.digest, 1)
    assert list_aliases(store) == [found]
    assert verify_log(store) == []


def test_a_decision_on_an_older_state_is_refused(store: Store, version: Version) -> None:
    point(store, version, 0)
    for expected in (0, 2):
        with pytest.raises(Refused, match="was changed by somebody else"):
            point(store, version, expected)
    assert point(store, version, 1).revision == 2


def test_an_alias_cleared_in_between_counts_as_changed(store: Store, version: Version) -> None:
    point(store, version, 0)
    point(store, None, 1)
    assert get_alias(store, "intents", "champion") is None
    assert list_aliases(store) == []
    for expected in (0, 1):
        with pytest.raises(Refused, match="was changed by somebody else"):
            point(store, version, expected)
    assert point(store, version, 2).revision == 3


def test_an_alias_needs_a_version_of_its_name_and_scope(store: Store, version: Version, chain: Chain) -> None:
    theirs = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme", "eu"))
    others = register(store, name="others", verdict=chain.verdict, actor="olive")
    unknown = version.model_copy(update={"digest": chain.candidate})
    for wrong, why in (
        (theirs, "is for tenant 'acme'"),
        (others, "is not a version of intents"),
        (unknown, "is not in the registry"),
    ):
        with pytest.raises(Refused, match=why):
            point(store, wrong, 0)
    with pytest.raises(Refused, match="is for tenant 'acme', region 'eu'"):
        point(store, theirs, 0, scope=Scope("acme", "us"))
    point(store, theirs, 0, scope=Scope("acme", "eu"))
    point(store, version, 0, scope=Scope("acme", "us"))  # a version of no tenant is everyone's
    for place in ({"alias": "latest"}, {"alias": "challenger"}, {"alias": ""}, {"name": "../x"}):
        with pytest.raises(UsageError):
            point(store, version, 0, **place)


def test_a_champion_needs_an_approval(store: Store, version: Version) -> None:
    with pytest.raises(Refused, match="intents@v1 is not approved"):
        point(store, version, 0, override_by=None)
    approve(store, version, approver="ann")
    assert point(store, version, 0, override_by=None).override_by == ""


def test_a_recalled_version_is_not_pointed_at(store: Store, version: Version) -> None:
    with database.writing(store.engine) as session:
        session.add(RecallRow(digest=version.digest, cause="x", reason="withdrawn", at=stamp()))
    with pytest.raises(Refused, match="recalled: withdrawn"):
        point(store, version, 0)


def test_of_two_promoters_at_once_one_wins_and_one_is_told(store: Store, version: Version) -> None:
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    outcomes: list[str] = []
    gate = threading.Barrier(2)

    def work(wanted: Version) -> None:
        own = Store(store.root)
        gate.wait()
        try:
            point(own, wanted, 0)
            outcomes.append("won")
        except Refused:
            outcomes.append("told")

    threads = [threading.Thread(target=work, args=(wanted,)) for wanted in (version, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["told", "won"]
    assert verify_log(store) == []


def test_an_alias_changed_behind_the_logs_back_shows(store: Store, version: Version) -> None:
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    point(store, version, 0)
    with database.writing(store.engine) as session:
        session.execute(update(AliasRow).values(version=other.digest))
    assert verify_log(store) == ["alias intents@champion for / differs between the log and the database: version"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(ALIASES), st.booleans(), st.integers(-1, 1), st.sampled_from(["", "acme"])),
        max_size=8,
    )
)
def test_any_sequence_of_changes_keeps_the_model(
    store: Store, version: Version, moves: list[tuple[str, bool, int, str]]
) -> None:
    with database.reading(store.engine) as session:
        model = {
            (alias, tenant): (
                revision_of(session, "intents", alias, Scope(tenant)),
                get_alias(session, "intents", alias, Scope(tenant)),
            )
            for alias in ALIASES
            for tenant in ("", "acme")
        }
    state = {place: (revision, found.version if found else None) for place, (revision, found) in model.items()}
    for alias, away, slip, tenant in moves:
        revision, _ = state[alias, tenant]
        wanted = None if away else version
        try:
            point(store, wanted, revision + slip, alias=alias, scope=Scope(tenant))
        except Refused:
            assert slip != 0
        else:
            assert slip == 0
            state[alias, tenant] = (revision + 1, wanted and wanted.digest)
    for (alias, tenant), (_, wanted) in state.items():
        found = get_alias(store, "intents", alias, Scope(tenant))
        assert (found.version if found else None) == wanted
