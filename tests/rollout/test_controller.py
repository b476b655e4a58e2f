"""The controller: every arrow, every refusal, and what happens to a rollout when the world changes under it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from tests.fabricate import APPROVER, NAME, OPERATOR, OWNER, Scene
from tests.forked import run_forked
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.scope import Scope
from tunesmith.registry import opening
from tunesmith.registry.aliases import get_alias, set_alias
from tunesmith.registry.signing.attestations import ENVELOPE
from tunesmith.registry.versions import Version
from tunesmith.rollout import commands, transitions
from tunesmith.rollout.analysis import Arm
from tunesmith.rollout.commands import abort, promote, resume, rollback, start
from tunesmith.rollout.controller import advance, give_up, look
from tunesmith.rollout.settings import RolloutSettings, Step
from tunesmith.rollout.state import Rollout, get_rollout, list_rollouts
from tunesmith.rollout.traffic import STEP, UNLOADED
from tunesmith.store import audit, database
from tunesmith.store.people.identities import add_user, deactivate, set_roles
from tunesmith.store.store import Store
from tunesmith.store.tables import RecallRow, RequestRow, VersionRow

Versions = dict[int, Version]
ANALYSIS = {"analysis": {"metric": "json_valid", "timeout": 100, "max_requests": 500}}


class Time:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at

    def pass_(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


def steps(*given: dict[str, Any]) -> tuple[Step, ...]:
    return RolloutSettings.model_validate({"steps": list(given)}).steps


def arm(ones: int, total: int) -> Arm:
    return Arm([1.0] * ones + [0.0] * (total - ones), requests=total)


def measuring(canary: Arm, stable: Arm) -> Callable[..., tuple[Arm, Arm]]:
    return lambda _store, _rollout, _metric: (canary, stable)


NOTHING = measuring(Arm(), Arm())
GOOD = measuring(arm(200, 200), arm(200, 200))
BAD = measuring(arm(0, 60), arm(60, 60))


def champion(scene: Scene) -> str:
    alias = get_alias(scene.store, NAME, "champion")
    return alias.version if alias else ""


def actions(scene: Scene) -> list[str]:
    with database.reading(scene.store.engine) as session:
        return [row.action for row in audit.entries(session) if row.action.startswith(("rollout.", "alias."))]


def begin(scene: Scene, version: Version, *given: dict[str, Any], clock: Time | None = None, **more: Any) -> Rollout:
    plan = steps(*(given or ({"setWeight": 10}, ANALYSIS, {"setWeight": 100})))
    more = {"actor": OPERATOR, "clock": clock or Time(), **more}
    return start(scene.store, name=NAME, version=version, steps=plan, **more)


@pytest.fixture
def first(scene: Scene, versions: Versions) -> Scene:
    """Version 1 is champion."""
    begin(scene, versions[1])
    return scene


# The straight way


def test_a_rollout_goes_through_its_steps_one_at_a_time(first: Scene, versions: Versions) -> None:
    time = Time()
    plan = (
        {"setWeight": 10},
        ANALYSIS,
        {"setWeight": 50},
        {"pause": {"seconds": 30}},
        {"pause": {}},
        {"setWeight": 100},
    )
    rollout = begin(first, versions[2], *plan, clock=time)
    seen = []

    def go(measure: Any = NOTHING, seconds: float = 1.0) -> None:
        time.pass_(seconds)
        moved = advance(first.store, rollout.id, clock=time, measure=measure)
        seen.append((moved.status, moved.step, moved.weight))

    go()
    go()
    go(GOOD)
    go()
    go()
    go()
    go(seconds=30)
    go()
    go()
    assert seen == [
        ("running", 1, 10),
        ("running", 1, 10),  # no traffic: it stays
        ("running", 2, 10),
        ("running", 3, 50),
        ("paused", 3, 50),
        ("paused", 3, 50),
        ("running", 4, 50),
        ("paused", 4, 50),
        ("paused", 4, 50),
    ]
    assert champion(first) == versions[1].digest
    resume(first.store, rollout.id, actor=OPERATOR, clock=time)
    seen.clear()
    go()
    go()
    go()
    assert seen == [("running", 6, 100), ("promoted", 6, 100), ("promoted", 6, 100)]
    assert champion(first) == versions[2].digest
    with database.reading(first.store.engine) as session:
        assert audit.verify(session) == []
    assert actions(first) == [
        "alias.set", "rollout.start", "rollout.start", "rollout.weight", "rollout.pass", "rollout.weight",
        "rollout.pause", "rollout.resume", "rollout.pause", "rollout.resume", "rollout.weight",
        "alias.set", "rollout.promote",
    ]  # fmt: skip


def test_advance_without_news_writes_nothing(first: Scene, versions: Versions) -> None:
    rollout = begin(first, versions[2])
    advance(first.store, rollout.id, clock=Time())
    before = (get_rollout(first.store, rollout.id), actions(first))
    for _ in range(3):
        advance(first.store, rollout.id, clock=Time(), measure=NOTHING)
    assert (get_rollout(first.store, rollout.id), actions(first)) == before


def test_a_worse_canary_is_aborted_with_its_numbers(first: Scene, versions: Versions) -> None:
    rollout = begin(first, versions[2])
    advance(first.store, rollout.id, clock=Time())
    ended = advance(first.store, rollout.id, clock=Time(), measure=BAD)
    assert (ended.status, ended.weight) == ("aborted", 0)
    assert ended.reason.startswith("worse; json_valid: canary 0.000")
    assert ended.history[-1]["judgement"]["evidence"]["worse"] >= 20
    assert champion(first) == versions[1].digest
    again = begin(first, versions[2])
    advance(first.store, again.id, clock=Time())
    ended = advance(first.store, again.id, clock=Time(), measure=measuring(arm(150, 500), arm(165, 500)))
    assert ended.reason.startswith("no decision within 500 canary requests")


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (NOTHING, "no decision within 100 s: the canary had no traffic"),
        (
            measuring(Arm([float("nan")] * 90, requests=90), arm(90, 90)),
            "no decision within 100 s: no usable score yet",
        ),
    ],
)
def test_an_undecided_analysis_aborts_at_its_timeout(first: Scene, versions: Versions, measure: Any, says: str) -> None:
    time = Time()
    rollout = begin(first, versions[2], clock=time)
    advance(first.store, rollout.id, clock=time)
    time.pass_(99)
    assert advance(first.store, rollout.id, clock=time, measure=measure).status == "running"
    time.pass_(1)
    ended = advance(first.store, rollout.id, clock=time, measure=measure)
    assert ended.status == "aborted"
    assert ended.reason.startswith(says)


def test_a_dead_metrics_source_is_no_evidence(first: Scene, versions: Versions) -> None:
    def dead(*_: Any) -> Any:
        raise OSError("connection refused")

    time = Time()
    rollout = begin(first, versions[2], clock=time)
    standing = advance(first.store, rollout.id, clock=time)
    judgement = look(first.store, standing, dead)
    assert judgement is not None
    assert (judgement.outcome, judgement.not_worse) == ("inconclusive", 1.0)
    assert advance(first.store, rollout.id, clock=time, measure=dead).status == "running"
    time.pass_(101)
    ended = advance(first.store, rollout.id, clock=time, measure=dead)
    assert ended.status == "aborted"
    assert "connection refused" in ended.reason


# What start refuses


def test_an_override_needs_role_and_reason_and_is_audited(first: Scene, versions: Versions) -> None:
    with pytest.raises(Refused, match="olga may not do this: it takes admin"):
        begin(first, versions[4], override="hurry")
    with pytest.raises(UsageError, match="needs a reason"):
        begin(first, versions[4], actor=OWNER, override="  ")
    rollout = begin(first, versions[4], actor=OWNER, override="a drill")
    assert rollout.override == "a drill"
    assert actions(first)[-2:] == ["rollout.override", "rollout.start"]


def test_someone_without_the_role_may_not_start_or_change(first: Scene, versions: Versions) -> None:
    with pytest.raises(Refused, match="bob may not do this"):
        begin(first, versions[2], actor=APPROVER)
    rollout = begin(first, versions[2])
    for command in (resume, promote, lambda *a, **k: abort(*a, **k, reason="no")):
        with pytest.raises(Refused, match="bob may not do this"):
            command(first.store, rollout.id, actor=APPROVER)
    with pytest.raises(Refused, match="bob may not do this"):
        rollback(first.store, name=NAME, actor=APPROVER, reason="no")


def test_a_second_live_rollout_of_a_name_is_refused(first: Scene, versions: Versions) -> None:
    begin(first, versions[2])
    with pytest.raises(Refused, match="rollout 2 of home is still running"):
        begin(first, versions[3])


def test_a_version_of_another_name_or_region_is_refused(first: Scene, versions: Versions) -> None:
    with pytest.raises(UsageError, match="is a version of home, not of away"):
        start(first.store, name="away", version=versions[2], steps=(), actor=OPERATOR)
    add_user(first.store, "eve", ["operator"], actor=OWNER, scope=Scope("acme"))
    with pytest.raises(Refused, match="only within acme"):
        begin(first, versions[2], actor="eve")
    eu = first.version(9, scope=Scope(region="eu"))
    with pytest.raises(Refused, match="is for tenant 'any', region 'eu'"):
        begin(first, eu)
    with pytest.raises(Refused, match="is for tenant 'any', region 'eu'"):
        begin(first, eu, scope=Scope(region="us"))
    assert begin(first, eu, scope=Scope(region="eu")).status == "promoted"


# Commands


def test_promote_skips_an_analysis_only_with_an_override(first: Scene, versions: Versions) -> None:
    rollout = begin(first, versions[2], {"setWeight": 5}, {"pause": {}}, {"setWeight": 100})
    advance(first.store, rollout.id, clock=Time())
    assert promote(first.store, rollout.id, actor=OPERATOR).status == "promoted"
    assert champion(first) == versions[2].digest

    watched = begin(first, versions[3])
    with pytest.raises(Refused, match="has an analysis that has not passed yet"):
        promote(first.store, watched.id, actor=OPERATOR)
    with pytest.raises(Refused, match="it takes admin"):
        promote(first.store, watched.id, actor=OPERATOR, override="it is fine")
    assert promote(first.store, watched.id, actor=OWNER, override="it is fine").status == "promoted"


def test_abort_gives_all_traffic_back(first: Scene, versions: Versions) -> None:
    rollout = begin(first, versions[2])
    advance(first.store, rollout.id, clock=Time())
    ended = abort(first.store, rollout.id, actor=OPERATOR, reason="complaints")
    assert (ended.status, ended.weight, ended.reason) == ("aborted", 0, "complaints")
    assert advance(first.store, rollout.id, measure=GOOD) == ended
    for command in (resume, promote, lambda *a, **k: abort(*a, **k, reason="again")):
        with pytest.raises(Refused, match="is aborted already"):
            command(first.store, rollout.id, actor=OPERATOR)


def test_a_canary_that_cannot_be_loaded_is_given_up(first: Scene, versions: Versions) -> None:
    rollout = begin(first, versions[2])
    assert give_up(first.store, rollout.id, "its adapter does not fit").reason == "its adapter does not fit"
    assert give_up(first.store, rollout.id, "again").reason == "its adapter does not fit"


# Rollback


def promoted(scene: Scene, version: Version) -> Rollout:
    rollout = begin(scene, version, {"setWeight": 100})
    while rollout.live:
        rollout = advance(scene.store, rollout.id, clock=Time())
    assert rollout.status == "promoted"
    return rollout


def signature_file(scene: Scene, version: Version) -> Path:
    return scene.store.root / "versions" / NAME / f"v{version.number}" / "model.sig"


def approval_file(scene: Scene, version: Version) -> Path:
    with database.reading(scene.store.engine) as session:
        (entry,) = [
            row for row in audit.entries(session) if row.action == "version.approve" and row.subject == version.digest
        ]
    return scene.store.blob_path(scene.store.record(entry.detail["signature"]["digest"]).blobs[ENVELOPE])


def test_rollback_goes_back_one_promotion_at_a_time(first: Scene, versions: Versions) -> None:
    promoted(first, versions[2])
    promoted(first, versions[3])
    undone = rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")
    assert (undone.status, undone.canary, champion(first)) == ("rolled_back", versions[3].digest, versions[2].digest)
    rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")
    assert champion(first) == versions[1].digest
    with pytest.raises(Refused, match="nothing served before it"):
        rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")
    assert champion(first) == versions[1].digest
    point(first, versions[3])
    with pytest.raises(Refused, match="no rollout promoted the champion"):
        rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")


@pytest.mark.parametrize(
    "lose",
    [
        lambda scene, version: signature_file(scene, version).unlink(),
        lambda scene, version: approval_file(scene, version).unlink(),
        lambda scene, version: recall(scene, version),
    ],
)
def test_rollback_passes_over_a_version_that_was_recalled_or_whose_files_are_gone(
    first: Scene, versions: Versions, lose: Callable[[Scene, Version], object]
) -> None:
    promoted(first, versions[2])
    promoted(first, versions[3])
    lose(first, versions[2])
    rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")
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
    rollout = begin(first, versions[2], {"setWeight": 100})
    advance(first.store, rollout.id, clock=Time())
    with pytest.MonkeyPatch.context() as patch:
        failing(patch)
        with pytest.raises(TunesmithError) as met:
            advance(first.store, rollout.id, clock=Time())
    assert not isinstance(met.value, Refused)
    assert get_rollout(first.store, rollout.id).status == "running"
    assert advance(first.store, rollout.id, clock=Time()).status == "promoted"
    promoted(first, versions[3])
    with pytest.MonkeyPatch.context() as patch:
        failing(patch)
        with pytest.raises(TunesmithError) as met:
            rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")
    assert not isinstance(met.value, Refused)
    assert champion(first) == versions[3].digest
    rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")
    assert champion(first) == versions[2].digest


def test_a_rollout_whose_canary_cannot_be_loaded_keeps_its_step(first: Scene, versions: Versions) -> None:
    time = Time()
    seen = []
    rollout = begin(first, versions[2], {"setWeight": 10}, {"pause": {"seconds": 5}}, {"setWeight": 100}, clock=time)
    for number, loads in enumerate((False, False, False, True, False)):
        time.pass_(9)
        needed(first, rollout, f"r{number}", loads=loads)
        moved = advance(first.store, rollout.id, clock=time)
        seen.append((moved.status, moved.step, moved.weight))
    assert seen == [
        ("running", 1, 10),  # so that somebody tries it
        ("paused", 1, 10),
        ("paused", 1, 10),
        ("running", 2, 10),
        ("running", 2, 10),
    ]
    recall(first, versions[2])
    assert advance(first.store, rollout.id, clock=time).status == "aborted"


def needed(scene: Scene, rollout: Rollout, key: str, *, loads: bool) -> None:
    """A request that was to go to the canary, on some server."""
    with database.writing(scene.store.engine) as session:
        session.add(
            RequestRow(
                id=key, at=f"2026-01-01T00:00:0{key[1:]}Z", name=NAME, version=rollout.canary, rollout=rollout.id,
                arm="canary" if loads else "stable", ok=True, seconds=0.1, scores={},
                features={STEP: rollout.step} if loads else {STEP: rollout.step, UNLOADED: True},
            )
        )  # fmt: skip


# A precondition breaks


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        (lambda scene, versions: point(scene, versions[3]), "the champion was changed during the rollout"),
        (lambda scene, versions: point(scene, None), "the champion was removed"),
        (lambda scene, versions: unregister(scene, versions[1]), "the champion is not in the registry"),
        (lambda scene, versions: recall(scene, versions[1]), "the champion was recalled"),
        (lambda scene, versions: recall(scene, versions[2]), "the canary was recalled"),
    ],
)
def test_a_rollout_aborts_when_an_arm_is_lost(
    first: Scene, versions: Versions, happens: Callable[[Scene, Versions], object], says: str
) -> None:
    rollout = begin(first, versions[2])
    with pytest.raises(Refused, match="is not at a pause"):
        resume(first.store, rollout.id, actor=OPERATOR)
    happens(first, versions)
    ended = advance(first.store, rollout.id, clock=Time(), measure=GOOD)
    assert (ended.status, ended.weight) == ("aborted", 0)
    assert says in ended.reason
    assert champion(first) != versions[2].digest


def unregister(scene: Scene, version: Version) -> None:
    with database.writing(scene.store.engine) as session:
        session.execute(delete(VersionRow).where(VersionRow.digest == version.digest))


@pytest.mark.parametrize("who", [APPROVER, OPERATOR])
def test_a_role_revoked_mid_flight_stops_the_promotion(first: Scene, versions: Versions, who: str) -> None:
    rollout = begin(first, versions[2], {"setWeight": 100})
    advance(first.store, rollout.id, clock=Time())
    deactivate(first.store, who, actor=OWNER)
    ended = advance(first.store, rollout.id, clock=Time())
    assert ended.status == "aborted"
    assert champion(first) == versions[1].digest


def test_an_override_without_its_role_does_not_promote(first: Scene, versions: Versions) -> None:
    add_user(first.store, "zoe", ["admin"], actor=OWNER)
    rollout = begin(first, versions[4], {"setWeight": 100}, actor="zoe", override="a drill")
    advance(first.store, rollout.id, clock=Time())
    set_roles(first.store, "zoe", ["operator"], actor=OWNER)
    assert "zoe may not do this" in advance(first.store, rollout.id, clock=Time()).reason


def test_a_clock_set_back_never_shortens_a_pause(first: Scene, versions: Versions) -> None:
    time = Time()
    rollout = begin(first, versions[2], {"setWeight": 5}, {"pause": {"seconds": 60}}, {"setWeight": 100}, clock=time)
    advance(first.store, rollout.id, clock=time)
    assert advance(first.store, rollout.id, clock=time).status == "paused"
    time.pass_(-86_400)
    reset = advance(first.store, rollout.id, clock=time)
    assert (reset.status, actions(first)[-1]) == ("paused", "rollout.clock")
    time.pass_(59)
    assert advance(first.store, rollout.id, clock=time).status == "paused"
    time.pass_(-2)  # a correction, not a jump
    assert advance(first.store, rollout.id, clock=time).revision == reset.revision
    time.pass_(3)
    assert advance(first.store, rollout.id, clock=time).status == "running"


# Crashes and races


@pytest.mark.parametrize(
    ("dies_in", "before"),
    [("transitions.point_champion", False), ("audit.append", True), ("store.change", True), ("store.change", False)],
)
def test_a_killed_promotion_is_carried_on(first: Scene, versions: Versions, dies_in: str, before: bool) -> None:
    rollout = begin(first, versions[2], {"setWeight": 100})
    standing = advance(first.store, rollout.id, clock=Time())
    first.store.engine.dispose()

    def promoting() -> None:
        place, name = dies_in.split(".")
        module = {"transitions": transitions, "audit": audit, "store": Store}[place]
        whole = getattr(module, name)

        def dying(*arguments: Any, **named: Any) -> None:
            if not before:
                whole(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        @contextlib.contextmanager
        def dying_at_an_end(*arguments: Any, **named: Any) -> Iterator[Any]:
            with whole(*arguments, **named) as session:
                yield session
                if before:
                    os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, dying_at_an_end if place == "store" else dying)
        advance(first.store, rollout.id, clock=Time())

    assert os.WTERMSIG(run_forked(promoting)) == signal.SIGKILL
    committed = dies_in == "store.change" and not before
    left = get_rollout(first.store, rollout.id)
    assert left.status == ("promoted" if committed else "running")
    assert committed or left == standing
    assert champion(first) == versions[2 if committed else 1].digest
    assert advance(first.store, rollout.id, clock=Time()).status == "promoted"
    assert champion(first) == versions[2].digest
    with database.reading(first.store.engine) as session:
        assert audit.verify(session) == []


def test_other_writers_do_not_wait_for_copies_of_weights(
    first: Scene, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, copied = opening.private_copy, list[str]()

    @contextlib.contextmanager
    def copying(folder: Path) -> Iterator[Path]:
        copied.append(folder.name)
        with contextlib.closing(sqlite3.connect(first.store.root / "tunesmith.db", timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")  # raises where somebody holds the lock of writers
            other.rollback()
        with whole(folder) as copy:
            yield copy

    monkeypatch.setattr(opening, "private_copy", copying)
    promoted(first, versions[2])
    assert copied == ["v2", "v2"], "once to start, once to promote"
    promote(first.store, begin(first, versions[3], {"setWeight": 100}).id, actor=OPERATOR)
    rollback(first.store, name=NAME, actor=OPERATOR, reason="complaints")
    assert copied[2:] == ["v3", "v3", "v2"]
    assert champion(first) == versions[2].digest


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
            recall(first, version, version.candidate)

    monkeypatch.setattr(commands, "check_may_serve", checked)
    with pytest.raises(Refused, match="may not sign versions" if lost == "signer" else "was recalled"):
        begin(first, versions[2])
    assert before == ["files"]
    assert champion(first) == versions[1].digest


def test_two_promoters_at_once_promote_once(first: Scene, versions: Versions) -> None:
    rollout = begin(first, versions[2], {"setWeight": 100})
    said = together(
        lambda: promote(first.store, rollout.id, actor=OPERATOR).status,
        lambda: promote(first.store, rollout.id, actor=OWNER).status,
        lambda: advance(first.store, rollout.id).status,
    )
    assert said.count("promoted") + sum("promoted already" in text for text in said) >= 2
    assert actions(first).count("rollout.promote") == 1
    assert champion(first) == versions[2].digest


def test_a_transition_for_an_older_revision_is_dropped(first: Scene, versions: Versions) -> None:
    rollout = begin(first, versions[2])

    def meanwhile_aborted(*_: Any) -> tuple[Arm, Arm]:
        abort(first.store, rollout.id, actor=OPERATOR, reason="first")
        return arm(200, 200), arm(200, 200)

    advance(first.store, rollout.id, clock=Time())
    moved = advance(first.store, rollout.id, clock=Time(), measure=meanwhile_aborted)
    assert (moved.status, moved.reason) == ("aborted", "first")


def recall(scene: Scene, version: Version, digest: str | None = None) -> None:
    row = {"digest": digest or version.digest, "cause": "licence X", "reason": "a licence was withdrawn", "at": "2026"}
    with database.writing(scene.store.engine) as session:
        session.add(RecallRow(**row))


def point(scene: Scene, version: Version | None) -> None:
    current = get_alias(scene.store, NAME, "champion")
    with scene.store.change(OWNER, "test", NAME, {}) as session:
        expected = current.revision if current else 0
        set_alias(session, name=NAME, alias="champion", version=version, expected=expected, actor=OWNER)


def together(*calls: Callable[[], str]) -> list[str]:
    """Run all at once; what each returned, or the error it raised."""
    said: list[str] = []

    def one(call: Callable[[], str]) -> None:
        try:
            said.append(call())
        except TunesmithError as error:
            said.append(error.what)

    threads = [threading.Thread(target=one, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said
