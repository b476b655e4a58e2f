"""The steps of a rollout; the canary's test: its decisions and refusals. Rates: benchmarks/canary_false_alarms.py."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.rollout.analysis import Arm, judge
from tunesmith.rollout.settings import Analysis, RolloutSettings


def arm(ones: int, total: int, failed: int = 0) -> Arm:
    return Arm(scores=[1.0] * ones + [0.0] * (total - ones), requests=total + failed, failed=failed)


ONES = [1.0] * 150
NAN = math.nan
NO_TRAFFIC = "the canary had no traffic"
TENTH = {"worse_by_at_most": 0.1}
GROUPS = {name: Arm([1.0] * 300, requests=300) for name in ("the requests of a", "the requests of b")}
BY_C = {"the requests of c": Arm([], requests=5000, cut=5000)}
CUT_BY_C = Arm([1.0] * 600, 5600, cut=5000, groups={**GROUPS, **BY_C})


@pytest.mark.parametrize(
    ("settings", "canary", "stable", "outcome", "says"),
    [
        ({"min_requests": 10}, arm(0, 40), arm(108, 360), "fail", "worse"),
        ({"min_requests": 10}, arm(26, 40), arm(10, 40), "pass", "not worse"),
        ({"min_requests": 10}, arm(24, 40), arm(100, 360), "pass", "not worse"),
        ({"at_least": 0.9}, arm(120, 200), arm(0, 200), "fail", "worse"),
        # A pass waits for min_requests, a failure does not.
        ({}, arm(49, 49), arm(0, 400), "inconclusive", "not decided yet"),
        ({}, arm(50, 50), arm(0, 400), "pass", "not worse"),
        ({"min_requests": 500}, arm(0, 60), arm(400, 400), "fail", "worse"),
        # Without stable's traffic only at_least decides.
        ({}, arm(200, 200), Arm(), "inconclusive", "stable has no traffic to compare with"),
        ({"at_least": 0.9}, arm(100, 100), Arm(), "pass", "not worse"),
        ({"at_least": 0.9}, arm(50, 100), Arm(), "fail", "worse"),
        ({"at_least": 0.9}, arm(91, 100), Arm(), "inconclusive", "not decided yet"),
        # Missing and unusable scores
        ({}, Arm(), Arm(), "inconclusive", NO_TRAFFIC),
        ({}, Arm(), arm(90, 100), "inconclusive", NO_TRAFFIC),
        ({}, Arm(requests=200), arm(90, 100), "inconclusive", "no scored request yet"),
        ({}, Arm([NAN] * 200, 200), arm(90, 100), "inconclusive", "no usable score yet"),
        ({}, Arm([True, "1", None, 1.5, -1, math.inf], 6), arm(90, 100), "inconclusive", "no usable score yet"),
        ({}, Arm([*ONES, *[NAN] * 50], 200), arm(150, 150), "inconclusive", "50 scores are not numbers"),
        # Failures
        *[({"metric": m}, Arm((), 60, 60), arm(30, 60), "fail", "worse") for m in ("a", "error_rate", "success_rate")],
        ({}, arm(60, 60), arm(10, 60), "pass", "not worse"),
        ({}, arm(60, 60, failed=5), arm(10, 60), "inconclusive", "5 of 65 canary requests failed"),
        # Clients that leave
        ({}, Arm(ONES, 225, left=75), arm(150, 150), "inconclusive", "the clients of 75 of 225 canary requests left"),
        ({}, Arm(ONES, 225, left=75), Arm(ONES, 225, left=75), "pass", "not worse"),
        ({"metric": "success_rate"}, Arm((), 225, left=75), Arm((), 225), "inconclusive", "the clients of 75 of 225"),
        # Answers that the requests cut
        (TENTH, Arm(ONES, 250, cut=100), Arm(ONES, 200, cut=50), "inconclusive", "100 of 250 canary"),
        (TENTH, Arm(ONES, 200, cut=69), Arm(ONES, 200, cut=50), "pass", "not worse"),
        ({"metric": "success_rate", **TENTH}, Arm(ONES, 250, cut=100), Arm(ONES, 200), "pass", ""),
        ({}, CUT_BY_C, Arm([1.0] * 600, 600, groups=GROUPS), "inconclusive", ""),
    ],
)
def test_what_decides(settings: dict[str, Any], canary: Arm, stable: Arm, outcome: str, says: str) -> None:
    found = judge(Analysis.model_validate({"metric": "exact_match", **settings}), canary, stable)
    document = found.document()
    assert (found.outcome, document["evidence"]["needed"]) == (outcome, 20)
    assert document["reason"].startswith(says)
    assert "allowed to be worse by 0." in document["reason"]
    shown = document["canary"]
    assert (shown["requests"], shown["failed"], shown["left"]) == (canary.requests, canary.failed, canary.left)
    assert (shown["cut"], shown["mean"] is None) == (canary.cut, not shown["n"])
    assert shown["mean"] is None or shown["low"] <= shown["mean"] <= shown["high"]
    if found.metric == "exact_match":
        assert shown["n"] + shown["unusable"] == len(canary.scores)


def test_equal_arms_without_margin_exhaust_max_requests() -> None:
    open_question = Analysis(metric="exact_match", worse_by_at_most=0.0, max_requests=100)
    before, after = judge(open_question, arm(30, 99), arm(30, 99)), judge(open_question, arm(30, 100), arm(30, 100))
    assert (before.outcome, before.exhausted) == ("inconclusive", False)
    assert (after.outcome, after.exhausted) == ("inconclusive", True)


def test_the_error_rate_is_shown_as_an_error_rate() -> None:
    judgement = judge(Analysis(metric="error_rate"), Arm(requests=300, failed=3), Arm(requests=300, failed=1))
    assert (judgement.outcome, judgement.canary["mean"]) == ("pass", pytest.approx(0.01))
    assert judgement.canary["low"] <= 0.01 <= judgement.canary["high"]  # type: ignore[operator]


NINE, ALL = {"setWeight": 9}, {"setWeight": 100}


def steps(*given: dict[str, Any]) -> RolloutSettings:
    return RolloutSettings.model_validate({"steps": list(given)})


def test_steps_are_read_and_a_pause_without_settings_waits_for_resume() -> None:
    read = steps(
        {"setWeight": 0}, {"setWeight": 10}, {"analysis": {"metric": "a"}}, {"pause": None}, {"setWeight": 100}
    )
    assert [step.kind for step in read.steps] == ["setWeight", "setWeight", "analysis", "pause", "setWeight"]
    assert (read.steps[2].analysis and read.steps[2].analysis.min_requests) == 50
    assert (read.steps[3].pause and read.steps[3].pause.seconds) is None
    last = steps({"setWeight": 100}, {"analysis": {"metric": "a", "at_least": 0.5, "max_requests": 50}}).steps[-1]
    assert (last.analysis and last.analysis.max_requests) == 50


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "at least 1 item"),
        ([{"pause": {}}], "last setWeight must be 100, it is missing"),
        ([{"setWeight": 100}, {"setWeight": 50}], "last setWeight must be 100, it is 50"),
        ([{"setWeight": 101}], "less than or equal to 100"),
        ([{"setWeight": -1}, {"setWeight": 100}], "greater than or equal to 0"),
        ([{"setWeight": 10, "pause": {}}, {"setWeight": 100}], "this one has setWeight, pause"),
        ([{}, {"setWeight": 100}], "this one has none"),
        ([{"analysis": {"metric": "json_valid"}}, {"setWeight": 100}], "step 1 is an analysis while the canary has no"),
        ([{"setWeight": 100}, {"analysis": {"metric": "a"}}], "no traffic at weight 100: set at_least"),
        ([NINE, {"analysis": {"metric": "a", "confidence": 1.0}}, ALL], "less than 1"),
        (
            [NINE, {"analysis": {"metric": "a", "max_requests": 49}}, ALL],
            "max_requests (49) is below min_requests (50)",
        ),
        ([NINE, {"analysis": {"metric": "error_rate", "at_least": 0.5}}, ALL], "success_rate"),
        ([NINE, {"pause": {"seconds": 0}}, ALL], "greater than 0"),
    ],
)
def test_steps_that_make_no_sense_are_refused_with_the_reason(given: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        steps(*given)
    assert says in str(caught.value)
