"""What one caller can do to a verdict: it cannot decide it, whatever its share and whichever arm it chooses."""

import math
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest

from tests.fabricate import NAME, OPERATOR, OWNER, Scene
from tests.rollout.conftest import Versions, begin, logged
from tunesmith.core.errors import UsageError
from tunesmith.core.text.names import Scope
from tunesmith.rollout import transitions
from tunesmith.rollout.analysis import Arm, Judgement, judge
from tunesmith.rollout.commands import abort
from tunesmith.rollout.controller import look
from tunesmith.rollout.settings import Analysis
from tunesmith.rollout.traffic import END_USER_GROUPS, LEFT, STEP, arms, end_user, goes_to_canary, usual_callers
from tunesmith.store.tables import RequestRow

AT = datetime(2026, 1, 10, tzinfo=UTC)
METRIC = "exact_match"


def requests(
    caller: str,
    arm: str,
    scores: list[float],
    *,
    user: str = "",
    users: int = 0,
    rollout: int | None = 1,
    at: datetime = AT,
) -> list[RequestRow]:
    """Rows of one caller: one for each score. users: by so many end users, in turn."""
    rows = []
    for number, score in enumerate(scores):
        named = user or (f"user-{number % users}" if users else "")
        rows.append(
            RequestRow(
                id=f"{caller}-{arm}-{user}-{number}-{at.isoformat()}-{len(scores)}", at=at.isoformat(), name=NAME,
                version="sha256:" + "0" * 64, rollout=rollout, arm=arm, ok=True, seconds=0.1, scores={METRIC: score},
                features={STEP: 0}, caller=caller, end_user=end_user(1, caller, named) if named else "",
            )
        )  # fmt: skip
    return rows


def judged(scene: Scene, rows: list[RequestRow], main: tuple[str, ...] | None = None) -> Judgement:
    with scene.store.writing() as session:
        session.add_all(rows)
    return judge(Analysis(metric=METRIC), *arms(scene.store, 1, 0, METRIC, main))


def mixed(ones: int, total: int) -> list[float]:
    return [1.0] * ones + [0.0] * (total - ones)


def team(canary: int, stable: int, callers: int = 5) -> list[RequestRow]:
    """60 requests to each arm of each caller. canary, stable: how many of them score 1."""
    return [
        row
        for number in range(callers)
        for arm, ones in (("canary", canary), ("stable", stable))
        for row in requests(f"app-{number}", arm, mixed(ones, 60))
    ]


@pytest.mark.attack("rollout", "one caller sends bad requests to a good canary", "no verdict by one caller")
@pytest.mark.parametrize("flood", [100, 5000])
def test_one_caller_cannot_abort_a_good_canary(scene: Scene, flood: int) -> None:
    hostile = requests("mallory", "canary", [0.0] * flood)
    pooled = Arm([1.0] * 300 + [0.0] * flood, 300 + flood), Arm([1.0] * 300, 300)
    assert judge(Analysis(metric=METRIC), *pooled).outcome == "fail"  # what it did to all requests together
    found = judged(scene, [*team(60, 60), *hostile])
    assert found.outcome == "inconclusive"
    assert "without the requests of mallory the evidence is too weak" in found.reason


@pytest.mark.attack("rollout", "one caller helps a bad canary by both arms", "no verdict by one caller")
def test_one_caller_cannot_pass_a_bad_canary(scene: Scene) -> None:
    hostile = [*requests("mallory", "canary", [1.0] * 5000), *requests("mallory", "stable", [0.0] * 5000)]
    found = judged(scene, [*team(30, 60), *hostile])
    assert (found.outcome, found.canary["uncounted"]) == ("inconclusive", 0)


@pytest.mark.attack("rollout", "an end user of the only application spoils an arm", "no verdict by one end user")
def test_one_end_user_of_an_application_cannot_decide(scene: Scene) -> None:
    honest = [
        *requests("app", "canary", [1.0] * 300, users=100), *requests("app", "stable", [1.0] * 300, users=100)
    ]  # fmt: skip
    found = judged(scene, [*honest, *requests("app", "canary", [0.0] * 3000, user="mallory")])
    assert found.outcome == "inconclusive"
    assert "without end users" in found.reason


@pytest.mark.attack("rollout", "a caller floods beside an application's traffic", "not counted")
@pytest.mark.parametrize(("canary", "outcome"), [(300, "pass"), (150, "fail")])
def test_other_callers_do_not_count_beside_main_callers(scene: Scene, canary: int, outcome: str) -> None:
    rows = [*requests("app", "canary", mixed(canary, 300), users=100), *requests("app", "stable", [1.0] * 300)]
    rows += [*requests("mallory", "canary", [0.0] * 2000), *requests("mallory", "stable", [0.0] * 2000)]
    found = judged(scene, rows, ("app",))
    assert (found.outcome, found.canary["n"], found.canary["uncounted"]) == (outcome, 300, 2000)


@pytest.mark.parametrize(("canary", "stable", "outcome"), [(60, 60, "pass"), (20, 55, "fail")])
def test_several_tokens_reach_a_verdict(scene: Scene, canary: int, stable: int, outcome: str) -> None:
    assert judged(scene, team(canary, stable)).outcome == outcome


def test_a_single_token_reaches_a_verdict_with_and_without_end_users(scene: Scene) -> None:
    rows = [*requests("app", "canary", [1.0] * 150), *requests("app", "stable", [1.0] * 150, users=40)]
    assert judged(scene, rows).outcome == "pass"
    canary, stable = arms(scene.store, 1, 0, METRIC, None)
    assert len(canary.groups) <= END_USER_GROUPS
    assert sum(part.requests for part in [*canary.groups.values(), *stable.groups.values()]) == 300
    # The same caller alone, where several called before: a second one has to confirm it.
    assert judge(Analysis(metric=METRIC), *arms(scene.store, 1, 0, METRIC, ())).outcome == "inconclusive"


@pytest.mark.attack("rollout", "one caller uses up max_requests", "not exhausted")
def test_one_caller_cannot_exhaust_max_requests(scene: Scene) -> None:
    judged(scene, [*team(60, 60, callers=2), *requests("mallory", "canary", [0.0] * 2000)])
    canary, stable = arms(scene.store, 1, 0, METRIC, None)
    assert not judge(Analysis(metric=METRIC, max_requests=500), canary, stable).exhausted
    assert judge(Analysis(metric=METRIC, max_requests=120), canary, stable).exhausted


@pytest.mark.attack("rollout", "failures at stable hide those of the canary", "no pass")
def test_failures_of_one_caller_at_stable_do_not_allow_more(scene: Scene) -> None:
    rows = team(60, 30)
    for row in rows[:30]:  # of app-0's canary requests
        row.ok, row.scores = False, {}
    for row in (spoilt := requests("mallory", "stable", [0.0] * 300)):
        row.ok, row.scores = False, {}
    found = judged(scene, [*rows, *spoilt])
    assert found.outcome == "inconclusive"


# Who the main caller is


def kept(scene: Scene, *rows: RequestRow) -> tuple[str, ...] | None:
    with scene.store.writing() as session:
        session.add_all(rows)
        session.flush()
        return usual_callers(session, NAME, Scope(), AT)


def day(caller: str, count: int, ago: int) -> list[RequestRow]:
    return requests(caller, "stable", [1.0] * count, rollout=None, at=AT - timedelta(days=ago, hours=-1))


def test_the_usual_caller_makes_most_of_the_traffic(scene: Scene) -> None:
    assert kept(scene) is None
    assert kept(scene, *day("app", 80, 1), *day("other", 20, 1), *day("old", 900, 30)) == ("app",)
    assert kept(scene, *day("other", 100, 2)) == ()


@pytest.mark.attack("rollout", "a flood before the rollout, to become main caller", "the usual caller stays")
def test_a_flood_on_one_day_counts_as_one_day(scene: Scene) -> None:
    usual = [row for ago in range(1, 7) for row in day("app", 10, ago)]
    assert kept(scene, *usual, *day("mallory", 5000, 1)) == ("app",)


def test_a_rollout_keeps_its_main_callers_and_the_audit_log_names_them(
    scene: Scene, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"setWeight": 50}, {"pause": {}}, {"setWeight": 100}
    with pytest.raises(UsageError, match="there is no user nobody"):
        begin(scene, versions[1], main_callers=["nobody"])
    monkeypatch.setattr(transitions, "now", lambda: AT)
    assert begin(scene, versions[1]).main_callers is None
    kept(scene, *day("app", 9, 1))
    second = begin(scene, versions[2], *steps)
    assert (second.main_callers, look(scene.store, second)) == (("app",), None)
    abort(scene.store, second.id, actor=OPERATOR, reason="no")
    assert begin(scene, versions[2], *steps, main_callers=[OWNER]).main_callers == (OWNER,)
    assert [entry["main_callers"] for entry in logged(scene, "rollout.start")] == [None, ["app"], [OWNER]]


def test_only_the_requests_of_this_rollout_and_step_count(scene: Scene) -> None:
    def one(arm: str, score: float | None, *, step: int = 2, rollout: int | None = 1, **more: Any) -> RequestRow:
        scores = {} if score is None else {METRIC: score}
        features = {STEP: step, **({LEFT: True} if more.pop("left", False) else {})}
        (row,) = requests("app", arm, [0.0], rollout=rollout)
        for key, value in {"id": f"{next(ids)}", "scores": scores, "features": features, **more}.items():
            setattr(row, key, value)
        return row

    ids = count()
    with scene.store.writing() as session:
        session.add_all([one("canary", 1.0), one("canary", None, ok=False), one("stable", 0.0)])
        session.add_all([one("canary", 0.5, step=1), one("canary", 0.5, rollout=7), one("stable", 0.5, rollout=None)])
        session.add_all([one("canary", None, left=True), one("canary", None, left=True), one("stable", math.nan)])
    canary, stable = arms(scene.store, 1, 2, METRIC, None)
    assert (canary.scores, canary.requests, canary.failed, canary.left) == ([1.0], 4, 1, 2)
    assert (stable.scores[0], stable.requests, stable.failed, stable.left) == (0.0, 2, 0, 0)
    (unusable,) = stable.scores[1:]  # handed on, and not dropped
    assert unusable is None or math.isnan(unusable)  # as the database reads what is no JSON


def test_the_share_of_the_canary_is_the_weight_and_who_has_it_keeps_it_as_the_weight_grows() -> None:
    found = [[goes_to_canary(3, weight, f"user-{number}") for weight in (0, 10, 50, 100)] for number in range(4000)]
    assert all(each == sorted(each) for each in found)
    assert [round(sum(share) / 4000, 1) for share in zip(*found, strict=True)] == [0, 0.1, 0.5, 1]
    assert all(each[3] and not each[0] for each in found)
