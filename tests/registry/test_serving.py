"""Which versions may serve: each reason, in the order in which they are checked."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.fabricate import Chain, approve, put_chain
from tunesmith.core.clock import now, stamp
from tunesmith.core.errors import Refused
from tunesmith.core.scope import Scope
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.registration import register
from tunesmith.registry.serving import GRANTED, Permission, may_load, may_serve
from tunesmith.registry.signing import release
from tunesmith.registry.signing.signatures import Expired, Untrusted
from tunesmith.registry.versions import Version
from tunesmith.rollout.preconditions import check_may_serve
from tunesmith.store import database
from tunesmith.store.people import identities
from tunesmith.store.store import Store
from tunesmith.store.tables import RecallRow


def asked(store: Store, version: Version, **how: Any) -> Permission:
    with database.reading(store.engine) as session:
        return may_serve(session, version, **how)


def loadable(store: Store, version: Version, scope: Scope = Scope()) -> Permission:
    with database.reading(store.engine) as session:
        return may_load(session, version, scope)


def test_an_approved_version_may_serve(store: Store, version: Version) -> None:
    assert asked(store, version).reason == "not_approved"
    assert loadable(store, version) == GRANTED
    approve(store, version, approver="ann")
    assert asked(store, version) == GRANTED
    assert asked(store, version, scope=Scope("acme", "eu")).granted  # a version for no tenant is for every tenant


def test_an_unknown_version_may_not_serve(store: Store, version: Version) -> None:
    unknown = version.model_copy(update={"digest": "sha256:" + "0" * 64})
    assert asked(store, unknown).reason == "unknown"


def test_another_tenants_version_may_not_serve(store: Store, chain: Chain) -> None:
    theirs = register(store, name="intents", verdict=chain.verdict, actor="olive", scope=Scope("acme", "eu"))
    approve(store, theirs, approver="ann")
    assert asked(store, theirs, scope=Scope("acme", "eu")) == GRANTED
    for scope in (Scope(), Scope("acme"), Scope("other", "eu")):
        permission = asked(store, theirs, scope=scope)
        assert permission.reason == "wrong_scope"
        assert "is for tenant 'acme', region 'eu'" in permission.message


def test_a_recalled_version_may_not_serve(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    with database.writing(store.engine) as session:
        session.add(RecallRow(digest=version.digest, cause="row x", reason="consent withdrawn", at=stamp()))
    permission = asked(store, version)
    assert (permission.reason, permission.message) == ("recalled", "was recalled: consent withdrawn")
    assert loadable(store, version) == permission


def test_an_expired_version_may_not_serve(store: Store, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    until = (now() + timedelta(days=1)).isoformat()
    version = register(store, name="intents", verdict=chain.verdict, actor="olive", expires_at=until)
    approve(store, version, approver="ann")
    assert asked(store, version) == GRANTED
    monkeypatch.setattr(release, "now", lambda: datetime.fromisoformat(until))
    permission = asked(store, version)
    assert permission.reason == "expired"
    with pytest.raises(Expired, match="intents@v1 expired on"):
        permission.require(version.label)


def test_a_version_of_a_signer_without_role_may_not_serve(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    identities.set_roles(store, "olive", ["admin"], actor="olive")
    permission = asked(store, version)
    assert permission.reason == "signer"
    assert "olive may not sign versions" in permission.message
    with pytest.raises(Untrusted, match="olive may not sign versions"), verified_copy(store, version):
        pass


def test_an_approver_without_role_does_not_count(store: Store, version: Version) -> None:
    approve(store, version, approver="ann")
    identities.set_roles(store, "ann", ["operator"], actor="olive")
    permission = asked(store, version)
    assert permission.reason == "not_approved"
    assert "ann may not approve" in permission.message
    identities.add_user(store, "cat", ["approver"], actor="olive")
    approve(store, version, approver="cat")
    assert asked(store, version) == GRANTED


def test_an_override_needs_its_permission(store: Store, version: Version) -> None:
    identities.add_user(store, "eve", ["operator"], actor="olive")
    assert asked(store, version, override_by="olive") == GRANTED
    permission = asked(store, version, override_by="eve")
    assert permission.reason == "override"
    assert "eve may not do this" in permission.message


def test_the_files_of_an_approval_are_read_when_a_rollout_asks(store: Store, version: Version) -> None:
    record = store.record(approve(store, version, approver="ann"))
    store.blob_path(record.blobs["envelope.json"]).unlink()
    assert asked(store, version) == GRANTED  # the database alone
    with database.reading(store.engine) as session, pytest.raises(Refused, match="is not approved"):
        check_may_serve(session, store, version, Scope(), override_by=None, verified={})


def test_a_failed_candidate_serves_once_approved(store: Store) -> None:
    verdict = put_chain(store, verdict="fail").verdict
    version = register(store, name="intents", verdict=verdict, actor="olive", override="a drill")
    assert asked(store, version).reason == "not_approved"
    approve(store, version, approver="ann", reason="for the drill")
    assert asked(store, version) == GRANTED
