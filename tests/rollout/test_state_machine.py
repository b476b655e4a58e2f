"""The state machine under every order of commands, clock jumps, evidence and recalls that hypothesis thinks of."""

import contextlib
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.fabricate import NAME, OPERATOR, OWNER, Scene, put_recall
from tests.rollout.conftest import copied
from tunesmith.core.errors import Refused
from tunesmith.registry.versions import get_alias, list_versions
from tunesmith.rollout import transitions
from tunesmith.rollout.analysis import Arm
from tunesmith.rollout.commands import abort, promote, resume, rollback, start
from tunesmith.rollout.controller import advance
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.rollout.state import LIVE, Rollout, list_rollouts
from tunesmith.store import audit

PLAN = RolloutSettings.model_validate(
    {
        "steps": [
            {"setWeight": 10},
            {"analysis": {"metric": "json_valid", "timeout": 50}},
            {"pause": {"seconds": 20}},
            {"pause": {}},
            {"setWeight": 100},
        ]
    }
).steps
PASSES, FAILS, OPEN = Arm([1.0] * 200, 200), Arm([0.0] * 60, 60), Arm()


class Machine(RuleBasedStateMachine):
    """Commands on a real store; what must hold is stated as invariants over what was seen before."""

    made: Scene
    at: datetime

    @initialize()
    def set_out(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=self.made.store.root.parent)
        self.scene = copied(self.made, Path(self.folder.name) / "store")
        self.versions = {version.number: version for version in list_versions(self.scene.store)}
        Machine.at = datetime(2026, 1, 1, tzinfo=UTC)
        self.recalled: set[str] = set()
        self.before: dict[int, Rollout] = {}

    def teardown(self) -> None:
        self.scene.store.engine.dispose()
        self.folder.cleanup()

    def live(self) -> Rollout | None:
        return next(iter(list_rollouts(self.scene.store, live=True)), None)

    def champion(self) -> str:
        alias = get_alias(self.scene.store, NAME)
        return alias.version if alias else ""

    @rule(number=st.sampled_from([1, 2, 3, 4]), override=st.sampled_from([None, "a drill"]))
    def start(self, number: int, override: str | None) -> None:
        version, actor = self.versions[number], OWNER if override else OPERATOR
        blocked = (
            self.live() is not None
            or (number == 4 and override is None)
            or version.digest in self.recalled
            or version.digest == self.champion()
        )
        with pytest.raises(Refused) if blocked else contextlib.nullcontext():
            start(self.scene.store, name=NAME, version=version, steps=PLAN, actor=actor, override=override)

    @precondition(lambda self: self.live())
    @rule(evidence=st.sampled_from([PASSES, PASSES, FAILS, OPEN]), seconds=st.sampled_from([1, 1, 25, 60, -3, -1000]))
    def advance(self, evidence: Arm, seconds: int) -> None:
        Machine.at += timedelta(seconds=seconds)
        current = self.live()
        assert current is not None
        moved = advance(self.scene.store, current.id, measure=lambda *_: (evidence, Arm([1.0] * 200, 200)))
        assert moved.revision - current.revision in (0, 1)
        assert moved.step - current.step in (0, 1)
        if moved.status == "promoted":
            assert current.step == len(PLAN)
        if current.current is not None and current.current.analysis and moved.step > current.step:
            assert evidence is PASSES

    @rule(what=st.sampled_from(["resume", "promote", "abort"]))
    def command(self, what: str) -> None:
        store, current = self.scene.store, self.live()
        if current is None:
            return
        with contextlib.suppress(Refused):
            if what == "resume":
                assert resume(store, current.id, actor=OPERATOR).step == current.step + 1
                assert current.step in (2, 3)
            elif what == "promote":
                promote(store, current.id, actor=OPERATOR)
                assert current.step > 1, "an analysis was skipped without an override"
            else:
                assert abort(store, current.id, actor=OPERATOR, reason="stop").status == "aborted"

    @rule()
    def rollback(self) -> None:
        live, standing = self.live(), self.champion()
        with contextlib.suppress(Refused):
            rollback(self.scene.store, name=NAME, actor=OPERATOR, reason="back")
            assert (self.champion() == standing) == (live is not None)
            assert live is not None or self.champion() not in self.recalled

    @rule(number=st.sampled_from([2, 3]))
    def recall(self, number: int) -> None:
        digest = self.versions[number].digest
        if digest not in self.recalled:
            self.recalled.add(digest)
            put_recall(self.scene.store, digest)

    @invariant()
    def what_always_holds(self) -> None:
        rollouts = list_rollouts(self.scene.store)
        assert sum(one.live for one in rollouts) <= 1
        for one in rollouts:
            assert one.weight == {"promoted": 100, "aborted": 0, "rolled_back": 0}.get(one.status, one.weight)
            assert one.status != "promoted" or one.override or one.canary != self.versions[4].digest
            was = self.before.get(one.id)
            if was is not None and was.status not in LIVE and one != was:
                assert (was.status, one.status) == ("promoted", "rolled_back")
            assert was is None or one == was or one.revision > was.revision
            if was is not None and was.status != "promoted" and one.status == "promoted":
                assert self.champion() == one.canary
                assert one.canary not in self.recalled
        self.before = {one.id: one for one in rollouts}
        with self.scene.store.reading() as session:
            assert audit.verify(session) == []


@pytest.fixture
def machine(made: Scene, monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setattr(Machine, "made", made, raising=False)
    monkeypatch.setattr(transitions, "now", lambda: Machine.at)
    return Machine


@pytest.mark.slow
def test_the_state_machine_holds_under_any_order_of_events(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
