"""The champion changes by compare-and-set alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, update

from tests.fabricate import Chain, approve, put_chain
from tunesmith.core.clock import stamp
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.registry.aliases import ALIASES, Alias, get_alias, list_aliases, revision_of, set_alias
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.serving import GRANTED, Permission, may_load, may_serve
from tunesmith.registry.signing import release
from tunesmith.registry.signing.signatures import Expired, Untrusted
from tunesmith.registry.versions import Version
from tunesmith.rollout.preconditions import check_may_serve
from tunesmith.store import database
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, RecallRow


def point(store: Store, version: Version | None, expected: int, **place: Any) -> Alias:
    """Under an override: these tests are about the alias, not about approvals."""
    where = {"name": "intents", "alias": "champion", "override_by": "olive", **place}
    with store.change("olive", "test.point", "intents", {}) as session:
        return set_alias(session, version=version, expected=expected, actor="olive", **where)


def test_an_alias_cleared_in_between_counts_as_changed(store: Store, version: Version) -> None:
    assert get_alias(store, "intents", "champion") is None
    assert point(store, version, 0).revision == 1
    found = get_alias(store, "intents", "champion")
    assert found is not None
    assert (found.version, found.revision, list_aliases(store)) == (version.digest, 1, [found])
    point(store, None, 1)
    assert get_alias(store, "intents", "champion") is None
    assert list_aliases(store) == []
    for expected in (0, 1, 3):
        with pytest.raises(Refused, match="was changed by somebody else"):
            point(store, version, expected)
    assert point(store, version, 2).revision == 3
    assert verify_log(store) == []
    other = register(store, name="intents", verdict=put_chain(store, seed=1).verdict, actor="olive")
    with database.writing(store.engine) as session:
        session.execute(update(AliasRow).values(version=other.digest))
    assert verify_log(store) == ["alias intents@champion for / differs between the log and the database: version"]


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


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# Which versions may serve: each reason in turn


def asked(store: Store, version: Version, **how: Any) -> Permission:
    with database.reading(store.engine) as session:
        return may_serve(session, version, **how)


def loadable(store: Store, version: Version) -> Permission:
    with database.reading(store.engine) as session:
        return may_load(session, version)


def test_a_version_serves_while_nothing_speaks_against_it(
    store: Store, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(store, version).reason == "not_approved"
    assert loadable(store, version) == GRANTED
    approve(store, version, approver="ann")
    assert asked(store, version) == GRANTED
    assert asked(store, version, scope=Scope("acme", "eu")).granted  # a version for no tenant is for every tenant
    assert asked(store, version.model_copy(update={"digest": "sha256:" + "0" * 64})).reason == "unknown"
    with database.writing(store.engine) as session:
        session.add(RecallRow(digest=version.digest, cause="row x", reason="consent withdrawn", at=stamp()))
    assert asked(store, version) == loadable(store, version)
    assert (asked(store, version).reason, asked(store, version).message) == (
        "recalled",
        "was recalled: consent withdrawn",
    )
    with database.writing(store.engine) as session:
        session.execute(delete(RecallRow))
    with monkeypatch.context() as patch:
        patch.setattr(release, "is_over", lambda _expires_at: True)
        with pytest.raises(Expired, match="intents@v1 expired on"):
            asked(store, version).require(version.label)
    identities.add_user(store, "eve", ["operator", "admin"], actor="olive")
    identities.set_roles(store, "olive", ["operator"], actor="eve")
    with pytest.raises(Untrusted, match="olive may not sign versions"):
        asked(store, version).require(version.label)
    identities.set_roles(store, "olive", ["engineer"], actor="eve")
    identities.set_roles(store, "ann", ["operator"], actor="eve")
    refused = asked(store, version)
    assert (refused.reason, "ann may not approve" in refused.message) == ("not_approved", True)
    assert asked(store, version, override_by="eve") == GRANTED
    refused = asked(store, version, override_by="olive")
    assert (refused.reason, "olive may not do this" in refused.message) == ("override", True)


def test_another_tenants_version_may_not_serve(store: Store, chain: Chain) -> None:
    theirs = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme", "eu"))
    approve(store, theirs, approver="ann")
    assert asked(store, theirs, scope=Scope("acme", "eu")) == GRANTED
    for scope in (Scope(), Scope("acme"), Scope("other", "eu")):
        refused = asked(store, theirs, scope=scope)
        assert (refused.reason, "is for tenant 'acme', region 'eu'" in refused.message) == ("wrong_scope", True)


def test_the_files_of_an_approval_are_read_when_a_rollout_asks(store: Store, version: Version) -> None:
    record = store.record(approve(store, version, approver="ann"))
    store.blob_path(record.blobs["envelope.json"]).unlink()
    assert asked(store, version) == GRANTED  # the database alone
    with database.reading(store.engine) as session, pytest.raises(Refused, match="is not approved"):
        check_may_serve(session, store, version, Scope(), override_by=None, verified={})
