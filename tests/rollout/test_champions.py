"""Promotions, rollbacks and aborts where a version has lost its standing."""

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene, approve
from tests.rollout.conftest import Versions, begin, champion, logged, serve
from tests.rollout.test_cli import Folder
from tunesmith.core.errors import Refused, UsageError
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.history import verify_log
from tunesmith.registry.signing import release
from tunesmith.registry.versions import Version, get_alias
from tunesmith.rollout import champions, controller
from tunesmith.rollout.champions import list_champions
from tunesmith.rollout.commands import abort, promote, rollback
from tunesmith.rollout.controller import advance
from tunesmith.rollout.state import Rollout
from tunesmith.store.people.identities import add_user, deactivate, set_roles
from tunesmith.store.store import Store

NO_APPROVER = "bob, who is deactivated"


def approved_by_cat(scene: Scene, version: Version) -> None:
    add_user(scene.store, "cat", ["approver"], actor=OWNER)
    approve(scene.store, version, approver="cat")


@pytest.mark.attack("rollout", "rollback to a version without standing approval")
def test_rollback_needs_an_approval_that_counts(scene: Scene, versions: Versions) -> None:
    serve(scene, versions[1], versions[2])
    approved_by_cat(scene, versions[3])
    deactivate(scene.store, APPROVER, actor=OWNER)
    with pytest.raises(Refused, match=NO_APPROVER) as refused:
        rollback(scene.store, name=NAME, actor=OPERATOR, reason="bad")
    assert f"could serve now: {NAME}@v3" in str(refused.value.fix)
    assert champion(scene) == versions[2].digest


@pytest.mark.attack("rollout", "rollback skips a version that lost its approval", "goes to the newest that may serve")
def test_rollback_goes_to_the_newest_that_may_serve(scene: Scene, versions: Versions) -> None:
    approved_by_cat(scene, versions[1])
    serve(scene, versions[1], versions[2])
    approve(scene.store, versions[3], approver="cat")
    serve(scene, versions[3])
    deactivate(scene.store, APPROVER, actor=OWNER)
    undone = rollback(scene.store, name=NAME, actor=OPERATOR, reason="bad")
    assert champion(scene) == versions[1].digest
    assert logged(scene, "rollout.rollback")[-1]["undone"] == [undone.id, undone.id - 1]


@pytest.mark.attack("rollout", "rollback under an override", "an admin may, and it is audited; refused")
def test_an_override_of_a_rollback_is_an_admins_and_audited(scene: Scene, versions: Versions) -> None:
    serve(scene, versions[1], versions[2])
    add_user(scene.store, "ada", ["admin"], actor=OWNER)
    deactivate(scene.store, APPROVER, actor=OWNER)
    with pytest.raises(Refused, match="olga may not do this"):
        rollback(scene.store, name=NAME, actor=OPERATOR, reason="bad", override="now")
    with pytest.raises(UsageError, match="needs a reason"):
        rollback(scene.store, name=NAME, actor="ada", reason="bad", override=" ")
    rollback(scene.store, name=NAME, actor="ada", reason="bad", override="worse otherwise")
    alias = get_alias(scene.store, NAME)
    assert alias is not None
    assert (alias.version, alias.override_by) == (versions[1].digest, "ada")
    assert logged(scene, "rollout.override")[-1]["reason"] == "worse otherwise"
    assert verify_log(scene.store) == []
    with scene.store.reading() as session:
        assert [one.refused for one in list_champions(session, scene.store)] == [None]
    set_roles(scene.store, "ada", ["operator"], actor=OWNER)
    with scene.store.reading() as session:
        (one,) = list_champions(session, scene.store)
    assert "the override does not count: ada may not do this" in str(one.refused)


def lose(how: str, scene: Scene, patch: pytest.MonkeyPatch, *several: Version) -> None:
    """Take away what no override replaces. ada is an admin."""
    if how == "recalled":
        for version in several:
            recall(scene.store, Cause(kind="version", value=version.digest), reason="a licence ended", actor=STEWARD)
    elif how == "expired":
        patch.setattr(release, "is_over", lambda _expires_at: True)
    else:
        set_roles(scene.store, OWNER, ["admin"], actor="ada")


@pytest.mark.attack("rollout", "rollback under an override, champion recalled or expired")
@pytest.mark.parametrize("lost", ["recalled", "expired", "signer"])
def test_a_rollback_takes_the_canary_out_whatever_the_champion_lost(
    scene: Scene, versions: Versions, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_user(scene.store, "ada", ["admin"], actor=OWNER)
    serve(scene, versions[1])
    live = begin(scene, versions[2], {"setWeight": 50}, {"pause": {}}, {"setWeight": 100})
    advance(scene.store, live.id)
    lose(lost, scene, monkeypatch, versions[1])
    undone = rollback(scene.store, name=NAME, actor="ada", reason="bad", override="whatever it takes")
    assert (undone.status, undone.weight) == ("rolled_back", 0)
    assert champion(scene) == versions[1].digest
    assert logged(scene, "rollout.override") == []
    assert "nothing serves" in logged(scene, "rollout.rollback")[-1]["nothing_serves"]


@pytest.mark.attack("rollout", "an override for a recalled, expired or unsigned version", "refused")
@pytest.mark.parametrize("lost", ["recalled", "expired", "signer"])
def test_no_override_lets_these_through(
    scene: Scene, versions: Versions, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_user(scene.store, "ada", ["admin"], actor=OWNER)
    serve(scene, versions[1], versions[2])
    live = begin(scene, versions[3], {"setWeight": 10}, {"pause": {}}, {"setWeight": 100})
    lose(lost, scene, monkeypatch, versions[1], versions[3])
    with pytest.raises(Refused):
        promote(scene.store, live.id, actor="ada", override="it must")
    abort(scene.store, live.id, actor="ada", reason="stop")
    with pytest.raises(Refused):
        rollback(scene.store, name=NAME, actor="ada", reason="bad", override="it must")
    with pytest.raises(Refused):
        begin(scene, versions[3], actor="ada", override="it must")
    assert champion(scene) == versions[2].digest
    assert logged(scene, "rollout.override") == []


def test_a_promotion_under_an_override_serves_by_it(scene: Scene, versions: Versions) -> None:
    approved_by_cat(scene, versions[1])
    serve(scene, versions[1])
    approve(scene.store, versions[4], approver=APPROVER)
    rollout = begin(scene, versions[4], {"pause": {}}, {"setWeight": 100})
    deactivate(scene.store, APPROVER, actor=OWNER)
    with pytest.raises(Refused, match=NO_APPROVER) as refused:
        promote(scene.store, rollout.id, actor=OWNER)
    assert f"could serve now: {NAME}@v1" in str(refused.value.fix)
    promoted = promote(scene.store, rollout.id, actor=OWNER, override="urgent")
    alias = get_alias(scene.store, NAME)
    assert alias is not None
    assert (promoted.status, alias.version, alias.override_by) == ("promoted", versions[4].digest, OWNER)
    assert len(logged(scene, "rollout.override")) == 1


@pytest.mark.attack("rollout", "abort onto a champion that lost its standing")
def test_an_abort_leaves_the_canary_and_says_that_nothing_serves(
    scene: Scene, versions: Versions, tmp_path: Path
) -> None:
    serve(scene, versions[1])
    approved_by_cat(scene, versions[2])
    by_hand = begin(scene, versions[2], {"setWeight": 50}, {"pause": {}}, {"setWeight": 100})
    deactivate(scene.store, APPROVER, actor=OWNER)
    (tmp_path / "project").mkdir()
    folder = Folder(tmp_path / "project", scene)
    code, ended = folder.run("rollout", "abort", str(by_hand.id))
    assert (code, ended["status"], ended["weight"]) == (3, "aborted", 0)
    assert NO_APPROVER in ended["champion"]["refused"]
    assert ended["champion"]["could_serve"] == [f"{NAME}@v2"]
    (entry,) = logged(scene, "rollout.abort")
    assert entry["nothing_serves"].startswith(f"nothing serves {NAME}: {NAME}@v1 is not approved")
    assert "nothing serves home: home@v1" in " ".join(folder.told("rollout", "status").split())
    # The next one serves at once: there is no champion to compare it with.
    code, started = folder.run("rollout", "start", f"{NAME}@v2")
    assert (code, started["status"], started["champion"]["refused"]) == (0, "promoted", None)
    code, undone = folder.run("rollout", "rollback", NAME)
    assert (code, f"could serve now: {NAME}@v2" in undone) == (3, True)


@pytest.mark.attack("rollout", "the controller with an arm that lost its standing", "aborted, with the reason")
@pytest.mark.parametrize("arm", ["canary", "champion"])
def test_the_controller_aborts_and_records_why(scene: Scene, versions: Versions, arm: str) -> None:
    lost, other = (versions[2], versions[1]) if arm == "canary" else (versions[1], versions[2])
    approved_by_cat(scene, other)
    serve(scene, versions[1])
    rollout = begin(scene, versions[2], {"setWeight": 50}, {"setWeight": 100})
    advance(scene.store, rollout.id)
    deactivate(scene.store, APPROVER, actor=OWNER)
    ended = advance(scene.store, rollout.id)
    assert (ended.status, ended.weight) == ("aborted", 0)
    assert ended.reason.startswith(f"the {arm} is not approved")
    (entry,) = logged(scene, "rollout.abort")
    assert (entry["reason"], "nothing_serves" in entry) == (ended.reason, lost is versions[1])
    assert champion(scene) == versions[1].digest


@pytest.mark.attack("rollout", "the approver is deactivated between check and promotion")
def test_standing_is_decided_in_the_transaction_of_the_promotion(
    scene: Scene, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved_by_cat(scene, versions[1])
    serve(scene, versions[1])
    rollout = begin(scene, versions[2])
    advance(scene.store, rollout.id)
    whole, seen = controller.broken_precondition, list[str]()

    def checked_then_deactivated(session: Any, store: Store, current: Rollout) -> str | None:
        found = whole(session, store, current)
        if not seen:
            seen.append("checked")
            session.rollback()
            deactivate(Store(store.root), APPROVER, actor=OWNER)
        return found

    monkeypatch.setattr(controller, "broken_precondition", checked_then_deactivated)
    ended = advance(scene.store, rollout.id)
    assert (seen, ended.status) == (["checked"], "aborted")
    assert NO_APPROVER in ended.reason
    assert champion(scene) == versions[1].digest


@pytest.mark.attack("rollout", "the approver is deactivated while a rollback commits")
def test_a_deactivation_waits_for_a_rollback(scene: Scene, versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(scene, versions[1], versions[2])
    whole, order = champions.check_may_serve, list[str]()

    def deactivating() -> None:
        deactivate(Store(scene.store.root), APPROVER, actor=OWNER)
        order.append("deactivated")

    thread = threading.Thread(target=deactivating)

    def checked(*arguments: Any, **named: Any) -> None:
        whole(*arguments, **named)
        if "began" not in arguments[0].info:  # before the transaction, for the files only
            return
        thread.start()
        thread.join(0.5)  # it waits for this transaction
        order.append("checked")

    monkeypatch.setattr(champions, "check_may_serve", checked)
    rollback(scene.store, name=NAME, actor=OPERATOR, reason="bad")
    thread.join()
    assert order == ["checked", "deactivated"]
    with scene.store.reading() as session:
        (one,) = list_champions(session, scene.store)
    assert (one.version, NO_APPROVER in str(one.refused)) == (f"{NAME}@v1", True)
