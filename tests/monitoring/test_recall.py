"""A recall reaches everything that was made from its cause, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, STEWARD, Scene, approve, lamp, put_base, put_dataset
from tests.rollout.conftest import begin, serve
from tunesmith.cli.terminal import command_line
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.data.dataset import load_dataset
from tunesmith.monitoring.recall import Cause, PendingRetrain, list_pending_retrains, recall, recall_status
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.versions import Version
from tunesmith.rollout.commands import rollback, start
from tunesmith.rollout.controller import advance
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.store import audit
from tunesmith.store.records import recalled
from tunesmith.store.tables import AuditRow, RecallRow, RequestRow

PLAN = RolloutSettings.model_validate({"steps": [{"setWeight": 10}, {"pause": {}}, {"setWeight": 100}]}).steps


def withdraw(scene: Scene, kind: str, value: str, **more: bool) -> set[str]:
    cause = Cause.model_validate({"kind": kind, "value": value})
    return {one.kind for one in recall(scene.store, cause, reason="asked to", actor=STEWARD, **more).reached}


def why(scene: Scene, digest: str) -> str | None:
    with scene.store.reading() as session:
        return recalled(session, digest)


def audited(scene: Scene) -> list[AuditRow]:
    with scene.store.reading() as session:
        return [row for row in audit.entries(session) if row.action == "recall.start"]


CHAIN = {"dataset", "training", "candidate", "answers", "evaluation", "verdict", "version", "approval"}


@pytest.mark.parametrize("kind", ["row", "source", "licence", "subject"])
def test_a_row_is_followed_to_everything_that_rests_on_it(
    scene: Scene, versions: dict[int, Version], kind: str
) -> None:
    row = load_dataset(scene.store, scene.dataset).examples("train")[0]
    value = {"row": row.id, "source": row.source, "licence": row.licence, "subject": row.subject}[kind]
    with pytest.raises(UsageError, match=f"no dataset version in this store holds a row of {kind} nowhere"):
        withdraw(scene, kind, "nowhere")
    assert withdraw(scene, kind, str(value), dry_run=True) == CHAIN
    assert {why(scene, version.digest) for version in versions.values()} == {None}
    assert audited(scene) == []
    assert withdraw(scene, kind, str(value)) == CHAIN
    for version in versions.values():
        assert why(scene, version.digest) == "asked to"
        with pytest.raises(Refused, match="recalled: asked to"), verified_copy(scene.store, version):
            pass


def test_a_recalled_test_row_counts_and_names_its_split(scene: Scene) -> None:
    row = load_dataset(scene.store, scene.dataset).examples("test")[0]
    found = recall(scene.store, Cause(kind="row", value=row.id), reason="asked to", actor=STEWARD)
    assert found.reached[0].rows == {"train": 0, "validation": 0, "test": 1}
    assert {one.label for one in found.reached if one.kind == "version"} == {f"{NAME}@v{n}" for n in (1, 2, 3, 4)}


def test_what_does_not_come_of_it_is_left_alone(scene: Scene, versions: dict[int, Version]) -> None:
    other = put_dataset(scene.store, [lamp(900, source="other.jsonl")])
    assert withdraw(scene, "source", "other.jsonl") == {"dataset"}
    assert why(scene, other) == "asked to"
    assert why(scene, scene.dataset) is None
    assert why(scene, versions[1].digest) is None
    assert why(scene, scene.base) is None


def test_recalls_of_a_version_and_of_a_base(scene: Scene, versions: dict[int, Version]) -> None:
    for _ in range(2):  # it may be repeated
        assert withdraw(scene, "version", versions[2].digest) == {"version", "approval", "candidate", "training"}
        for _, _, child in scene.store.children(versions[2].digest):  # a lost approval does not stop a recall
            Path(scene.store.record_where(child)).unlink(missing_ok=True)
    assert [each.detail["reached"][0]["digest"] for each in audited(scene)] == [versions[2].digest] * 2
    with scene.store.reading() as session:
        assert audit.verify(session) == []
        assert session.query(RecallRow).count() == 4
    training = scene.store.record(versions[2].candidate).parents["training"]
    assert why(scene, training) == "asked to"
    with pytest.raises(Refused, match="recalled"), verified_copy(scene.store, versions[2]):
        pass
    # What was measured beside it is none the worse.
    for number in (1, 3):
        assert why(scene, versions[number].digest) is None
        with verified_copy(scene.store, versions[number]):
            pass
    assert withdraw(scene, "base", scene.base) == {"base", "training", "candidate", "version", "approval"}
    assert why(scene, versions[1].digest) == "asked to"


def test_a_recall_names_champions_and_tenants_and_aborts_rollouts(scene: Scene, versions: dict[int, Version]) -> None:
    with scene.store.writing() as session:
        for n, tenant in enumerate(("acme", "acme", "zenith")):
            at = f"2026-01-0{n + 1}T00:00:00Z"
            which = {"version": versions[1].digest, "name": NAME, "arm": "stable", "ok": True, "seconds": 0.1}
            session.add(RequestRow(id=f"r{n}", at=at, tenant=tenant, scores={}, features={}, **which))
    for number in (1, 2):
        rollout = start(scene.store, name=NAME, version=versions[number], steps=PLAN, actor=OPERATOR)
    cause = Cause(kind="version", value=versions[1].digest)
    with pytest.raises(UsageError, match="never recalled"):
        recall_status(scene.store, cause)
    found = recall(scene.store, cause, reason="wrong", actor=STEWARD)
    assert [(one.name, one.version) for one in found.champions] == [(NAME, versions[1].digest)]
    assert found.rollouts == (rollout.id,)
    served = [(one.tenant, one.requests, one.last[:10]) for one in found.served]
    assert served == [("acme", 2, "2026-01-02"), ("zenith", 1, "2026-01-03")]
    assert found.tenants == ("", "acme", "zenith")
    assert advance(scene.store, rollout.id).reason == "the champion was recalled: wrong"
    status = recall_status(scene.store, cause)
    assert not status.gone
    assert status.left == (f"{NAME}@champion still points at it",)
    assert status.replaced[NAME].startswith(f"{NAME}@v")


def test_the_role_a_reason_and_the_right_kind_are_needed(scene: Scene, versions: dict[int, Version]) -> None:
    cause = Cause(kind="version", value=versions[1].digest)
    with pytest.raises(Refused, match="olga may not do this: it takes admin or steward"):
        recall(scene.store, cause, reason="no", actor=OPERATOR)
    with pytest.raises(UsageError, match="needs a reason"):
        recall(scene.store, cause, reason=" ", actor=OWNER)
    with pytest.raises(UsageError, match="is a version, not a base"):
        recall(scene.store, Cause(kind="base", value=versions[1].digest), reason="no", actor=OWNER)
    with pytest.raises(UsageError, match="this one has 9999"):
        recall(scene.store, Cause(kind="row", value="x" * 9999), reason="no", actor=OWNER)


def test_a_recall_is_not_gone_while_something_is_made_of_its_rows(scene: Scene) -> None:
    serve(scene, scene.version(40))
    row = load_dataset(scene.store, scene.dataset).examples("train")[0]
    by_row = Cause(kind="row", value=row.id)
    recall(scene.store, by_row, reason="asked to", actor=STEWARD)
    other = put_dataset(scene.store, [row])
    status = recall_status(scene.store, by_row)
    assert any(line.startswith("dataset") and "was made from it since" in line for line in status.left), other
    assert status.retrain == (NAME,)


# What a recall left to be made anew is seen until what replaces it serves, and then no more


def only(scene: Scene) -> PendingRetrain:
    (one,) = list_pending_retrains(scene.store)
    return one


def commands(due: PendingRetrain) -> list[str]:
    return [command_line(step) for step in due.next]


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
    assert commands(due) == ["tunesmith run"]
    assert list_pending_retrains(scene.store, "another") == []

    without(scene)
    new = scene.version(50, approved=False)
    due = only(scene)
    assert due.replacement == new.label
    assert commands(due) == [
        f"tunesmith approve {new.label} --reason REASON --as USER",
        f"tunesmith rollout start {new.label}",
    ]
    approve(scene.store, new, approver=APPROVER, reason="looks right")
    assert commands(only(scene)) == [f"tunesmith rollout start {new.label}"]
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
    rollout = begin(scene, third)
    assert commands(only(scene)) == ["tunesmith rollout status"]
    while rollout.live:
        rollout = advance(scene.store, rollout.id)
    assert list_pending_retrains(scene.store) == []


def test_a_recalled_version_or_base_asks_for_a_change_and_each_tenant_is_a_place_of_its_own(
    scene: Scene, versions: dict[int, Version]
) -> None:
    serve(scene, versions[3])
    withdraw(scene, "version", versions[4].digest)
    withdraw(scene, "version", versions[3].digest)
    change, again = only(scene).next
    assert (change, change.verb, again.verb) == ("change the rows or settings in tunesmith.yaml", "", "run")
    serve(scene, versions[1])
    serve(scene, versions[2], scope=Scope("acme"))
    withdraw(scene, "base", scene.base)
    assert [(one.tenant, one.version, one.next[0]) for one in list_pending_retrains(scene.store)] == [
        ("", f"{NAME}@v3", "name another `base` in tunesmith.yaml"),
        ("acme", f"{NAME}@v2", "name another `base` in tunesmith.yaml"),
    ]
    scene.base = put_base(scene.store, seed=1)
    without(scene)
    serve(scene, scene.version(80), scope=Scope("acme"))
    assert [one.tenant for one in list_pending_retrains(scene.store)] == [""]
