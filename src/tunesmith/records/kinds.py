"""The models of all kinds of records, by kind. The records reference is generated from them."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.records.answers import AnswersBody
from tunesmith.records.base import BaseBody
from tunesmith.records.body import Body
from tunesmith.records.candidate import CandidateBody
from tunesmith.records.dataset import DatasetBody, DocumentsBody, QualityBody, SignOffBody
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.records.forecast import CurveBody, ForecastBody
from tunesmith.records.search import SearchBody, TrainingSearchBody
from tunesmith.records.training import TrainingBody
from tunesmith.records.verdict import VerdictBody
from tunesmith.records.version import ApprovalBody, ExportBody, VersionBody

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
        BaseBody,
        DatasetBody,
        SignOffBody,
        QualityBody,
        DocumentsBody,
        TrainingBody,
        CandidateBody,
        VersionBody,
        ExportBody,
        ApprovalBody,
    )
}
