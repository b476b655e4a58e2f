"""What a project may state under `hold:`; the rules that the server could not apply are refused."""

import math
from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.engines.protocol import Completion, TokenScore
from tunesmith.holding.rules import Holder
from tunesmith.holding.settings import HoldSettings
from tunesmith.project import Project, parse_settings
from tunesmith.services.review import answer_holder

PROJECT = """
name: x
base: y
data: {sources: [{path: a.jsonl, licence: MIT}]}
candidates: {a: {}}
task: {schema: schema.json}
policy: {quiet: {requests: [hello], lacks: [home]}, judged: {requests: [hello], rubric: be kind,
  judge: {url: "http://127.0.0.1:1/v1", model: m}}}
hold: HOLD
"""


def parsed(hold: str, more: str = "") -> HoldSettings:
    found = parse_settings(PROJECT.replace("HOLD", hold) + more, "tunesmith.yaml").hold
    assert found is not None
    return found


def test_defaults_and_durations() -> None:
    found = parsed("{rules: [{field: intent, values: [pay]}, {confidence_below: 0.8}, {policy: quiet}], deadline: 15m}")
    assert (found.deadline, found.at_deadline, found.wait, found.fetch) == (900, "refuse", 20, 3600)


@pytest.mark.parametrize(
    ("hold", "more", "problem"),
    [
        ("{rules: []}", "", "at least 1"),
        ("{rules: [{field: intent}]}", "", "exactly one of"),
        ("{rules: [{field: a, confidence_below: 0.5}]}", "", "field needs values"),
        ("{rules: [{confidence_below: 1.5}]}", "", "less than or equal to 1"),
        ("{rules: [{policy: loud}]}", "", "'loud' is not a check of policy; they are quiet, judged"),
        ("{rules: [{policy: judged}]}", "", "judged asks a judge"),
        ("{rules: [{values: [x]}], deadline: 8d}", "", "less than or equal to 604800"),
        ("{rules: [{values: [x]}], deadline: 0s}", "", "greater than 0"),
        ("{rules: [{values: [x]}], at_deadline: leave}", "", "refuse"),
        ("{rules: [{confidence_below: 0.5}]}", 'engine: {kind: vllm, url: "http://127.0.0.1:1"}', "no probabilities"),
    ],
)
def test_what_is_refused(hold: str, more: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parsed(hold, more)


def test_a_field_needs_a_schema() -> None:
    text = PROJECT.replace("task: {schema: schema.json}", "").replace("HOLD", "{rules: [{field: a, values: [b]}]}")
    with pytest.raises(UsageError, match=r"hold\.rules\.0\.field: .* set task\.schema"):
        parse_settings(text, "tunesmith.yaml")


def test_a_project_makes_a_holder(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    (tmp_path / "tunesmith.yaml").write_text(PROJECT.replace("HOLD", "{rules: [{policy: quiet}]}"))
    holder = answer_holder(Project.load(tmp_path))
    assert holder is not None
    assert holder.schema == '{"type": "object"}'
    assert holder.reasons(Completion("at home", "stop", 1, 2)) == ("policy quiet: it contains 'home'",)
    assert holder.reasons(Completion("quietly", "length", 1, 2)) != ()  # nobody knows what would have followed
    (tmp_path / "tunesmith.yaml").write_text(PROJECT.replace("hold: HOLD\n", ""))
    assert answer_holder(Project.load(tmp_path)) is None


def test_a_key_that_a_closed_schema_leaves_out_is_no_doubt() -> None:
    rules = HoldSettings.model_validate({"rules": [{"field": "intent", "values": ["pay"]}]})
    schema = {"type": "object", "properties": {"intent": {}, "room": {}}}
    answer = Completion('{"room": "attic"}', "stop", 1, 1)
    assert Holder(rules, {}, {**schema, "additionalProperties": False}).reasons(answer) == ()
    assert Holder(rules, {}, schema).reasons(answer) == ("the answer has no intent",)
    assert Holder(rules, {}).reasons(answer) == ("the answer has no intent",)


@pytest.mark.parametrize("logprobs", [(), (math.nan,), (-0.01, math.nan), (math.nan, -0.01), (-5.0, -0.01)])
def test_a_confidence_in_doubt_holds(logprobs: tuple[float, ...]) -> None:
    holder = Holder(HoldSettings.model_validate({"rules": [{"confidence_below": 0.5}]}), {})
    scores = tuple(TokenScore("x", b"x", logprob) for logprob in logprobs)
    assert holder.needs_scores
    assert len(holder.reasons(Completion("x", "stop", 1, 1, scores=scores))) == 1
    sure = (TokenScore("x", b"x", -0.01),)
    assert holder.reasons(Completion("x", "stop", 1, 1, scores=sure)) == ()
