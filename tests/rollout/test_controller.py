"""The controller: every arrow, every refusal, and what happens to a rollout when the world changes under it."""

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete

from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, Scene, put_recall
from tests.rollout.conftest import Versions, begin, champion, serve
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.registry.serving import set_alias
from tunesmith.registry.versions import Version, get_alias
from tunesmith.rollout import commands, transitions
from tunesmith.rollout.analysis import Arm
from tunesmith.rollout.commands import abort, promote, resume, rollback
from tunesmith.rollout.controller import Watched, advance, give_up, look
from tunesmith.rollout.state import Rollout, get_rollout, list_rollouts
from tunesmith.rollout.transitions import make_transition
from tunesmith.store import audit
from tunesmith.store.people.identities import add_user, deactivate, set_roles
from tunesmith.store.store import Store
from tunesmith.store.tables import VersionRow

ANALYSIS = {"analysis": {"metric": "json_valid", "timeout": 100, "max_requests": 500}}
AT_ONCE = {"setWeight": 100}


class Time:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at

    def pass_(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


def arm(ones: int, total: int) -> Arm:
    return Arm([1.0] * ones + [0.0] * (total - ones), requests=total)


def measuring(canary: Arm, stable: Arm) -> Callable[..., tuple[Arm, Arm]]:
    return lambda _store, _rollout, _metric: (canary, stable)


def dead(*_: Any) -> Any:
    raise OSError("connection refused")


NOTHING = measuring(Arm(), Arm())
GOOD = measuring(arm(200, 200), arm(200, 200))


def actions(scene: Scene) -> list[str]:
    with scene.store.reading() as session:
        return [row.action for row in audit.entries(session) if row.action.startswith(("rollout.", "alias."))]


def watched(scene: Scene, version: Version, *steps: dict[str, Any], **more: Any) -> Rollout:
    """A rollout, by default with an analysis."""
    return begin(scene, version, *(steps or ({"setWeight": 10}, ANALYSIS, AT_ONCE)), **more)


@pytest.fixture(autouse=True)
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The time that rollouts go by."""
    monkeypatch.setattr(transitions, "now", clock := Time())
    return clock


@pytest.fixture
def first(scene: Scene, versions: Versions) -> Scene:
    """Version 1 is champion."""
    watched(scene, versions[1])
    return scene


def test_a_rollout_goes_through_its_steps_one_at_a_time(first: Scene, versions: Versions, time: Time) -> None:
    pauses = {"pause": {"seconds": 30}}, {"pause": {}}
    rollout = watched(first, versions[2], {"setWeight": 10}, ANALYSIS, {"setWeight": 50}, *pauses, AT_ONCE)

    def check(measure: Any, seconds: float, *expected: object) -> None:
        time.pass_(seconds)
        moved = advance(first.store, rollout.id, measure=measure)
        assert (moved.status, moved.step, moved.weight, moved.revision) == expected

    check(NOTHING, 1, "running", 1, 10, 1)
    check(NOTHING, 1, "running", 1, 10, 1)  # no traffic: it stays, and nothing is written
    check(GOOD, 1, "running", 2, 10, 2)
    check(NOTHING, 1, "running", 3, 50, 3)
    check(NOTHING, 1, "paused", 3, 50, 4)
    check(NOTHING, 29, "paused", 3, 50, 4)
    check(NOTHING, 2, "running", 4, 50, 5)
    check(NOTHING, 1, "paused", 4, 50, 6)
    check(NOTHING, 1, "paused", 4, 50, 6)
    assert champion(first) == versions[1].digest
    resume(first.store, rollout.id, actor=OPERATOR)
    check(NOTHING, 1, "running", 6, 100, 8)
    check(NOTHING, 1, "promoted", 6, 100, 9)
    check(NOTHING, 1, "promoted", 6, 100, 9)
    assert champion(first) == versions[2].digest
    with first.store.reading() as session:
        assert audit.verify(session) == []
    assert actions(first) == [
        "alias.set", "rollout.start", "rollout.start", "rollout.weight", "rollout.pass", "rollout.weight",
        "rollout.pause", "rollout.resume", "rollout.pause", "rollout.resume", "rollout.weight",
        "alias.set", "rollout.promote",
    ]  # fmt: skip


def test_a_worse_canary_is_aborted_with_its_numbers(first: Scene, versions: Versions) -> None:
    for canary, stable, says in (
        (arm(0, 60), arm(60, 60), "worse; json_valid: canary 0.000"),
        (arm(150, 500), arm(165, 500), "no decision within 500 canary requests"),
    ):
        rollout = watched(first, versions[2])
        advance(first.store, rollout.id)
        ended = advance(first.store, rollout.id, measure=measuring(canary, stable))
        assert (ended.status, ended.weight, ended.reason[: len(says)]) == ("aborted", 0, says)
        assert (ended.history[-1]["judgement"]["evidence"]["worse"] >= 20) == says.startswith("worse")
    assert champion(first) == versions[1].digest


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (NOTHING, "the canary had no traffic"),
        (measuring(Arm([float("nan")] * 90, requests=90), arm(90, 90)), "no usable score yet"),
        (dead, "the metrics could not be read: OSError: connection refused"),
    ],
)
def test_an_undecided_analysis_aborts_at_its_timeout(
    first: Scene, versions: Versions, time: Time, measure: Any, says: str
) -> None:
    rollout = watched(first, versions[2])
    judgement = look(first.store, advance(first.store, rollout.id), measure)
    assert judgement is not None
    assert (judgement.outcome, judgement.evidence["not_worse"] <= 1) == ("inconclusive", True)
    time.pass_(99)
    assert advance(first.store, rollout.id, measure=measure).status == "running"
    time.pass_(1)
    ended = advance(first.store, rollout.id, measure=measure)
    assert ended.status == "aborted"
    assert ended.reason.startswith(f"no decision within 100 s: {says}")


# Commands


def test_what_start_refuses(first: Scene, versions: Versions) -> None:
    add_user(first.store, "eve", ["operator"], actor=OWNER, scope=Scope("acme"))
    eu, us = (first.version(9, scope=Scope(region="eu")), Scope(region="us"))
    two, four = versions[2], versions[4]
    tries: list[tuple[Version, dict[str, Any], type[TunesmithError], str]] = [
        (four, {"override": "hurry"}, Refused, "olga may not do this: it takes admin"),
        (four, {"actor": OWNER, "override": "  "}, UsageError, "needs a reason"),
        (two, {"actor": APPROVER}, Refused, "bob may not do this"),
        (two, {"actor": "eve"}, Refused, "only within acme"),
        (two, {"name": "away"}, UsageError, "is a version of home, not of away"),
        (versions[1], {}, Refused, "home@v1 serves all of home's traffic already"),
        (eu, {}, Refused, "is for tenant 'any', region 'eu'"),
        (eu, {"scope": us}, Refused, "is for tenant 'any', region 'eu'"),
    ]
    for version, more, error, says in tries:
        with pytest.raises(error, match=says):
            watched(first, version, **more)
    assert watched(first, eu, scope=Scope(region="eu")).status == "promoted"
    rollout = watched(first, four, actor=OWNER, override="a drill")
    assert rollout.override == "a drill"
    assert actions(first)[-2:] == ["rollout.override", "rollout.start"]
    with pytest.raises(Refused, match=f"rollout {rollout.id} of home is still running"):
        watched(first, versions[3])


def test_promote_skips_an_analysis_only_with_an_override(first: Scene, versions: Versions) -> None:
    rollout = watched(first, versions[2], {"setWeight": 5}, {"pause": {}}, AT_ONCE)
    advance(first.store, rollout.id)
    assert promote(first.store, rollout.id, actor=OPERATOR).status == "promoted"
    assert champion(first) == versions[2].digest
    late = watched(first, versions[3])
    assert advance(first.store, late.id).step == 1
    with pytest.raises(Refused, match="has an analysis that has not passed yet"):
        promote(first.store, late.id, actor=OPERATOR)
    with pytest.raises(Refused, match="it takes admin"):
        promote(first.store, late.id, actor=OPERATOR, override="it is fine")
    assert promote(first.store, late.id, actor=OWNER, override="it is fine").status == "promoted"


def test_abort_gives_all_traffic_back_and_only_an_operator_may(first: Scene, versions: Versions) -> None:
    rollout = watched(first, versions[2])
    advance(first.store, rollout.id)

    def all_refused(actor: str, says: str) -> None:
        for command in (resume, promote, lambda *a, **k: abort(*a, **k, reason="no")):
            with pytest.raises(Refused, match=says):
                command(first.store, rollout.id, actor=actor)

    all_refused(APPROVER, "bob may not do this")
    with pytest.raises(Refused, match="bob may not do this"):
        rollback(first.store, name=NAME, actor=APPROVER, reason="no")
    with pytest.raises(Refused, match="is not at a pause"):
        resume(first.store, rollout.id, actor=OPERATOR)
    (first.store.root / "versions" / NAME / "v2" / "model.sig").unlink()  # traffic leaves it all the same
    ended = abort(first.store, rollout.id, actor=OPERATOR, reason="complaints")
    assert (ended.status, ended.weight, ended.reason) == ("aborted", 0, "complaints")
    assert advance(first.store, rollout.id, measure=GOOD) == ended
    all_refused(OPERATOR, "is aborted already")
    unloadable = watched(first, versions[3])
    for reason in ("its adapter does not fit", "again"):
        assert give_up(first.store, unloadable.id, reason).reason == "its adapter does not fit"


# Rollback


def undo(scene: Scene) -> Rollout:
    return rollback(scene.store, name=NAME, actor=OPERATOR, reason="complaints")


def test_rollback_goes_back_one_promotion_at_a_time(first: Scene, versions: Versions) -> None:
    serve(first, versions[2], versions[3])
    undone = undo(first)
    assert (undone.status, undone.canary, champion(first)) == ("rolled_back", versions[3].digest, versions[2].digest)
    undo(first)
    assert champion(first) == versions[1].digest
    with pytest.raises(Refused, match="nothing served before it"):
        undo(first)
    assert champion(first) == versions[1].digest
    point(first, versions[3])
    with pytest.raises(Refused, match="no rollout promoted the champion"):
        undo(first)


@pytest.mark.parametrize("recalled", [True, False])
def test_rollback_passes_over_a_version_that_was_recalled_or_whose_files_are_gone(
    first: Scene, versions: Versions, recalled: bool
) -> None:
    serve(first, versions[2], versions[3])
    if recalled:
        put_recall(first.store, versions[2].digest)
    else:
        (first.store.root / "versions" / NAME / "v2" / "model.sig").unlink()
    undo(first)
    assert champion(first) == versions[1].digest
    assert [one.status for one in list_rollouts(first.store)] == ["rolled_back", "rolled_back", "promoted"]


def too_many_files(patch: pytest.MonkeyPatch) -> None:
    whole = os.open

    def opening(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith("/v2"):
            raise OSError(errno.EMFILE, "Too many open files")
        return whole(path, *arguments, **named)

    patch.setattr(os, "open", opening)


def approvals_away(patch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> bytes:
        raise TunesmithError("the bucket cannot be used")

    patch.setattr(Store, "read_blob", away)


@pytest.mark.parametrize("failing", [too_many_files, approvals_away])
def test_an_error_that_may_pass_is_no_decision(
    first: Scene, versions: Versions, failing: Callable[[pytest.MonkeyPatch], None]
) -> None:
    def fails(call: Callable[[], object]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            failing(patch)
            with pytest.raises(TunesmithError) as met:
                call()
        assert not isinstance(met.value, Refused)

    rollout = watched(first, versions[2], AT_ONCE)
    advance(first.store, rollout.id)
    fails(lambda: advance(first.store, rollout.id))
    assert get_rollout(first.store, rollout.id).status == "running"
    assert advance(first.store, rollout.id).status == "promoted"
    serve(first, versions[3])
    fails(lambda: undo(first))
    assert champion(first) == versions[3].digest
    undo(first)
    assert champion(first) == versions[2].digest


# A precondition breaks


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        (lambda scene, versions: point(scene, versions[3]), "the champion was changed during the rollout"),
        (lambda scene, versions: point(scene, None), "the champion was removed"),
        (lambda scene, versions: unregister(scene, versions[1]), "the champion is not in the registry"),
        (lambda scene, versions: put_recall(scene.store, versions[1].digest), "the champion was recalled"),
        (lambda scene, versions: put_recall(scene.store, versions[2].digest), "the canary was recalled"),
    ],
)
def test_a_rollout_aborts_when_an_arm_is_lost(
    first: Scene, versions: Versions, happens: Callable[[Scene, Versions], object], says: str
) -> None:
    rollout = watched(first, versions[2])
    happens(first, versions)
    ended = advance(first.store, rollout.id, measure=GOOD)
    assert (ended.status, ended.weight) == ("aborted", 0)
    assert says in ended.reason
    assert champion(first) != versions[2].digest


def unregister(scene: Scene, version: Version) -> None:
    with scene.store.writing() as session:
        session.execute(delete(VersionRow).where(VersionRow.digest == version.digest))


def test_who_lost_the_role_meanwhile_promotes_nothing(first: Scene, versions: Versions) -> None:
    add_user(first.store, "zoe", ["admin"], actor=OWNER)
    overridden = {"actor": "zoe", "override": "a drill"}
    for version, more, lose, says in (
        (versions[4], overridden, lambda: set_roles(first.store, "zoe", ["operator"], actor=OWNER), "zoe may not do"),
        (versions[2], {}, lambda: deactivate(first.store, OPERATOR, actor=OWNER), "olga is deactivated"),
    ):
        rollout = watched(first, version, AT_ONCE, **more)
        advance(first.store, rollout.id)
        lose()
        assert says in advance(first.store, rollout.id).reason
    assert champion(first) == versions[1].digest


def test_a_clock_set_back_never_shortens_a_pause(first: Scene, versions: Versions, time: Time) -> None:
    rollout = watched(first, versions[2], {"setWeight": 5}, {"pause": {"seconds": 60}}, AT_ONCE)
    advance(first.store, rollout.id)
    assert advance(first.store, rollout.id).status == "paused"
    time.pass_(-86_400)
    reset = advance(first.store, rollout.id)
    assert (reset.status, actions(first)[-1]) == ("paused", "rollout.clock")
    time.pass_(59)
    assert advance(first.store, rollout.id).status == "paused"
    time.pass_(-2)  # a correction, not a jump
    assert advance(first.store, rollout.id).revision == reset.revision
    time.pass_(3)
    assert advance(first.store, rollout.id).status == "running"


@pytest.mark.attack("rollout", "the clock is set back and forward, or another server's clock is an hour ahead")
def test_a_clock_set_forward_never_shortens_a_pause(first: Scene, versions: Versions, time: Time) -> None:
    steady = [0.0]
    watched_by = Watched(lambda: steady[0])
    rollout = watched(first, versions[2], {"setWeight": 5}, {"pause": {"seconds": 60}}, AT_ONCE)

    def later(seconds: float, shift: float = 0.0) -> str:
        time.pass_(seconds + shift)
        steady[0] += seconds
        return advance(first.store, rollout.id, watched=watched_by).status

    assert [later(1), later(1), later(30, 3600), later(1, -3700), later(1)] == ["running", *["paused"] * 4]
    assert later(30, 3700) == "paused", "the clock is right again"
    time.pass_(-7200)  # another server's clock is behind
    advance(first.store, rollout.id)
    time.pass_(7200)
    assert [later(40), later(15), later(10)] == ["paused", "paused", "running"]


# Crashes and races


@pytest.mark.parametrize("lost", ["signer", "evidence"])
def test_what_changes_after_the_files_were_verified_counts(
    first: Scene, versions: Versions, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    whole, before = commands.check_may_serve, list[str]()

    def checked(session: Any, store: Store, version: Version, *scope: Scope, **named: Any) -> None:
        whole(session, store, version, *scope, **named)
        if before:
            return
        before.append("files")
        session.rollback()
        if lost == "signer":
            set_roles(Store(store.root), OWNER, ["admin"], actor=OWNER)
        else:
            put_recall(first.store, version.candidate)

    monkeypatch.setattr(commands, "check_may_serve", checked)
    with pytest.raises(Refused, match="may not sign versions" if lost == "signer" else "was recalled"):
        watched(first, versions[2])
    assert before == ["files"]
    assert champion(first) == versions[1].digest


def test_a_transition_for_an_older_revision_is_dropped(first: Scene, versions: Versions) -> None:
    rollout = watched(first, versions[2])

    def meanwhile_aborted(*_: Any) -> tuple[Arm, Arm]:
        abort(first.store, rollout.id, actor=OPERATOR, reason="first")
        return arm(200, 200), arm(200, 200)

    advance(first.store, rollout.id)
    moved = advance(first.store, rollout.id, measure=meanwhile_aborted)
    assert (moved.status, moved.reason) == ("aborted", "first")
    seen: list[str] = []

    def decide(_session: Any, found: Rollout) -> Any:
        seen.append(found.status)
        raise Refused("seen")

    with pytest.raises(Refused, match="seen"):
        make_transition(first.store, rollout, OPERATOR, "rollout.resume", decide)
    assert seen == ["aborted"], "what the transaction finds, not what its caller read"


def point(scene: Scene, version: Version | None) -> None:
    current = get_alias(scene.store, NAME)
    with scene.store.change(OWNER, "test", NAME, {}) as session:
        expected = current.revision if current else 0
        set_alias(session, name=NAME, version=version, expected=expected, actor=OWNER)
