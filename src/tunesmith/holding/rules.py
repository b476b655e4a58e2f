"""Which answers wait for a person. Every doubt holds an answer."""

from __future__ import annotations

import json
import math
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.core.text.folding import fold
from tunesmith.core.values import Schema
from tunesmith.engines.protocol import Completion
from tunesmith.evaluation.policy.rules import hold
from tunesmith.evaluation.policy.settings import Policy
from tunesmith.holding.settings import HoldRule, HoldSettings


class Holder:
    """Applies a project's rules to answers. policy: the project's checks. schema: of the task's answers, as text."""

    def __init__(self, settings: HoldSettings, policy: Policy, schema: Schema | None = None) -> None:
        self.settings = settings
        self.schema = None if schema is None else json.dumps(schema, ensure_ascii=False)
        self._policy, self._schema = policy, schema

    @property
    def needs_scores(self) -> bool:
        """Whether a rule reads the probabilities of an answer's tokens."""
        return any(rule.confidence_below is not None for rule in self.settings.rules)

    def reasons(self, answer: Completion) -> tuple[str, ...]:
        """Why an answer waits, by rule; empty if it may leave. They quote the project file, never the answer."""
        reasons = (self._reason(rule, answer) for rule in self.settings.rules)
        return tuple(reason for reason in reasons if reason is not None)

    def _reason(self, rule: HoldRule, answer: Completion) -> str | None:
        if rule.values is not None:
            reason = _labelled(rule.field, tuple(rule.values), answer.text)
            if reason is None and rule.field is not None:
                return _misshapen(rule.field, self._schema, answer.text)
            return reason
        if rule.confidence_below is not None:
            return _unsure(rule.confidence_below, answer)
        assert rule.policy is not None
        outcome, why = hold(self._policy[rule.policy], answer.text, cut=answer.finish == "length")
        return None if outcome == "held" else f"policy {rule.policy}: {why}"


def _labelled(field: str | None, values: tuple[Any, ...], text: str) -> str | None:
    try:
        value = parse_json(text)
    except NotJson:
        value = text
    if field is not None and not isinstance(value, dict):
        return "the answer is not a JSON object"
    stated = value if field is None else value.get(field)
    said = {_plain(each) for each in (stated if isinstance(stated, list) else [stated])}
    if field is None:
        said.add(_plain(text))
    named = next((each for each in values if _plain(each) in said), None)
    return None if named is None else f"{field or 'the answer'} is {json.dumps(named, ensure_ascii=False)}"


def _misshapen(field: str, schema: Schema | None, text: str) -> str | None:
    """Why an answer, a JSON object, may say in another shape what a rule on a field looks for; None if it does not.

    Callers may ask for another shape, by a schema of theirs or in words.
    """
    from tunesmith.core.reading.answer_schema import satisfies

    value = parse_json(text)
    try:
        if schema is not None and not satisfies(value, schema):
            return "the answer does not fit the task's schema"
    except UsageError:
        return "the task's schema cannot be followed"
    if field not in value:
        closed = schema is not None and schema.get("additionalProperties") is False
        return None if closed else f"the answer has no {field}"
    stated = value[field]
    nested = any(isinstance(each, dict | list) for each in (stated if isinstance(stated, list) else [stated]))
    return f"{field} is an object or a nested list" if nested else None


def _plain(value: Any) -> str:
    """A value as text in which numbers that are equal, and texts that look alike, are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return fold(value).strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _unsure(bound: float, answer: Completion) -> str | None:
    if not answer.scores:
        return "there are no probabilities of its tokens"
    least = min((math.exp(score.logprob) for score in answer.scores), key=lambda each: -1.0 if each != each else each)
    return None if least >= bound else f"its least likely token has probability {least:.3f}, below {bound:g}"
