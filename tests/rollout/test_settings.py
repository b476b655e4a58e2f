"""The steps a rollout may have, and what is said about those it may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.rollout.settings import RolloutSettings


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
        ([{"setWeight": 9}, {"analysis": {"metric": "a", "confidence": 1.0}}, {"setWeight": 100}], "less than 1"),
        (
            [{"setWeight": 9}, {"analysis": {"metric": "a", "max_requests": 49}}, {"setWeight": 100}],
            "max_requests (49) is below min_requests (50)",
        ),
        (
            [{"setWeight": 9}, {"analysis": {"metric": "error_rate", "at_least": 0.5}}, {"setWeight": 100}],
            "success_rate",
        ),
        ([{"setWeight": 9}, {"pause": {"seconds": 0}}, {"setWeight": 100}], "greater than 0"),
    ],
)
def test_steps_that_make_no_sense_are_refused_with_the_reason(given: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        steps(*given)
    assert says in str(caught.value)
