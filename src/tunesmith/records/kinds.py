"""The models of all kinds of records, by kind. The records reference is generated from them."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.records.answers import AnswersBody
from tunesmith.records.body import Body
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.records.forecast import CurveBody, ForecastBody
from tunesmith.records.search import SearchBody, TrainingSearchBody
from tunesmith.records.verdict import VerdictBody

BODIES: Mapping[str, type[Body]] = {
    body.kind: body
    for body in (
        SearchBody,
        TrainingSearchBody,
        AnswersBody,
        CurveBody,
        ForecastBody,
        EvaluationBody,
        VerdictBody,
    )
}
