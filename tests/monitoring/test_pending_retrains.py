"""What a recall left to be made anew is seen until what replaces it serves, and then no more."""

from __future__ import annotations

from tests.fabricate import APPROVER, NAME, OPERATOR, STEWARD, Scene, approve, lamp, put_dataset
from tunesmith.core.scope import Scope
from tunesmith.data.dataset import load_dataset
from tunesmith.monitoring.pending_retrains import PendingRetrain, list_pending_retrains
from tunesmith.monitoring.recall import Cause, recall
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import rollback, start
from tunesmith.rollout.controller import advance
from tunesmith.rollout.settings import RolloutSettings

AT_ONCE = RolloutSettings.model_validate({"steps": [{"setWeight": 100}]}).steps


def withdraw(scene: Scene, kind: str, value: str) -> None:
    recall(scene.store, Cause.model_validate({"kind": kind, "value": value}), reason="asked to", actor=STEWARD)


def serve(scene: Scene, version: Version, scope: Scope = Scope()) -> None:
    rollout = start(scene.store, name=NAME, version=version, steps=AT_ONCE, actor=OPERATOR, scope=scope)
    while rollout.live:
        rollout = advance(scene.store, rollout.id)
    assert rollout.status == "promoted"


def only(scene: Scene) -> PendingRetrain:
    (one,) = list_pending_retrains(scene.store)
    return one


def without(scene: Scene) -> None:
    """From now on versions are made of a dataset that is not withdrawn."""
    scene.dataset = put_dataset(scene.store, [lamp(n) for n in range(100, 140)])


def test_it_is_due_until_a_version_without_the_row_serves(scene: Scene, versions: dict[int, Version]) -> None:
    assert list_pending_retrains(scene.store) == []
    serve(scene, versions[1])
    assert list_pending_retrains(scene.store) == []
    row = load_dataset(scene.store, scene.dataset).examples("train")[0]
    withdraw(scene, "row", row.id)
    due = only(scene)
    assert (due.name, due.version, due.causes) == (NAME, f"{NAME}@v1", (f"row {row.id}",))
    assert (due.serves, due.answers, due.replacement) == (f"{NAME}@v1", False, None)
    assert due.next == ("tunesmith run",)
    assert list_pending_retrains(scene.store, "another") == []

    without(scene)
    new = scene.version(50, approved=False)
    due = only(scene)
    assert due.replacement == new.label
    assert due.next == (
        f"tunesmith approve {new.label} --as NAME --reason WHY",
        f"tunesmith rollout start {new.label}",
    )
    approve(scene.store, new, approver=APPROVER, reason="looks right")
    assert only(scene).next == (f"tunesmith rollout start {new.label}",)
    # Nothing answers, so there is nothing to compare with: what replaces it serves at once.
    serve(scene, new)
    assert list_pending_retrains(scene.store) == []


def test_a_retrain_stays_pending_after_a_rollback(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[1])
    scene.dataset = put_dataset(scene.store, [lamp(900, source="b.jsonl")])
    second = scene.version(60)
    serve(scene, second)
    withdraw(scene, "source", "b.jsonl")
    assert (only(scene).serves, only(scene).answers) == (second.label, False)
    rollback(scene.store, name=NAME, actor=OPERATOR, reason="recalled")
    assert (only(scene).version, only(scene).serves, only(scene).answers) == (second.label, f"{NAME}@v1", True)
    without(scene)
    third = scene.version(61)
    rollout = start(scene.store, name=NAME, version=third, steps=AT_ONCE, actor=OPERATOR)
    assert only(scene).next == ("tunesmith rollout status",)
    while rollout.live:
        rollout = advance(scene.store, rollout.id)
    assert list_pending_retrains(scene.store) == []


def test_a_recalled_version_or_base_asks_for_a_change(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[3])
    withdraw(scene, "version", versions[4].digest)
    withdraw(scene, "version", versions[3].digest)
    assert only(scene).next == ("change the rows or settings in tunesmith.yaml", "tunesmith run")
    withdraw(scene, "base", scene.base)
    assert only(scene).next == ("name another `base` in tunesmith.yaml", "tunesmith run")


def test_what_never_served_leaves_nothing_due(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[1])
    withdraw(scene, "version", versions[3].digest)
    assert list_pending_retrains(scene.store) == []


def test_each_tenant_is_a_place_of_its_own(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[1])
    serve(scene, versions[2], scope=Scope("acme"))
    withdraw(scene, "licence", "Apache-2.0")
    assert [(one.tenant, one.version) for one in list_pending_retrains(scene.store)] == [
        ("", f"{NAME}@v1"),
        ("acme", f"{NAME}@v2"),
    ]
    scene.dataset = put_dataset(scene.store, [lamp(1, licence="MIT")])
    new = scene.version(80)
    serve(scene, new, scope=Scope("acme"))
    assert [one.tenant for one in list_pending_retrains(scene.store)] == [""]
