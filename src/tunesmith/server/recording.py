"""Records of served requests: measurements in the database, the newest answers in memory only.

The text of a request is stored only where its caller asks for that.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import insert
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.clock import stamp
from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.view import Omitted, View
from tunesmith.engines.protocol import Completion
from tunesmith.evaluation.metrics.declared import Answered, Scoring, checked
from tunesmith.monitoring.cases import Case, put_case
from tunesmith.rollout.traffic import STEP, end_user
from tunesmith.server.errors import ApiError, bad_request, not_stored
from tunesmith.server.intake import limits
from tunesmith.server.metrics import Metrics
from tunesmith.server.routing import Route
from tunesmith.services.served_scorers import ServedScorers
from tunesmith.store import database
from tunesmith.store.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

LOG = logging.getLogger("tunesmith.server")


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was answered, or that failed (completion None). model: the name that the client asked for.

    whole: the answer was decoded to its end, so it can be scored; False if the client left earlier. cut: the request's
    own max_tokens, stop text, format or tools shaped the answer, which says nothing about the version, so it is not
    scored. messages: the conversation, which stays in memory only. end_user: the request's `user`, "" without one.
    """

    id: str
    user: User
    model: str
    route: Route
    seconds: float
    features: Mapping[str, float]
    completion: Completion | None
    whole: bool = True
    cut: bool = False
    messages: tuple[Message, ...] = ()
    end_user: str = ""


class _Kept(NamedTuple):
    """An answer that feedback may score. cut: see Served."""

    messages: tuple[Message, ...]
    text: str
    cut: bool


_CUT = "max_tokens, stop text, format or tools of the request shaped the answer, so it says nothing about the version"


@dataclass(slots=True)
class _Unwritten:
    """The row of a request whose thread waits until it is written. leads: that thread writes all that waits."""

    row: dict[str, Any]
    leads: bool = False
    woken: threading.Event = field(default_factory=threading.Event)


class FeedbackResult(View):
    """The scores that feedback added. kept: the request was stored as a case.

    not_scored: metric of the task -> why the server cannot compute it from the expected text.
    """

    request_id: str
    scores: dict[str, float]
    kept: Omitted[bool] = None
    not_scored: Omitted[dict[str, str]] = None


class Recorder:
    """Records requests and their scores.

    scorers: some apply to every answer, others need the expected text, which feedback gives. kept_answers: number of
    answers kept in memory for feedback.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        scorers: ServedScorers,
        kept_answers: int,
        region: str,
    ) -> None:
        self._store, self._metrics, self._region = store, metrics, region
        self._scorers = scorers
        self._answers: OrderedDict[str, _Kept] = OrderedDict()
        self._most, self._lock = kept_answers, threading.Lock()
        self._unwritten: list[_Unwritten] = []
        self._led = False  # a thread writes what waits

    def write(self, served: Served) -> None:
        """Record a request. If that fails, its answer is still sent, and a metric counts the loss.

        Requests that are recorded at the same time share a transaction: each would wait for the disk otherwise.
        """
        outcome = "failed" if served.completion is None else _answered(served)
        models = (served.model, served.route.version.label)
        self._metrics.request(served.route.arm, outcome, served.seconds, served.completion, models)
        if served.completion is not None and served.whole:
            self._keep(served.id, _Kept(served.messages, served.completion.text, served.cut))
        mine = _Unwritten(self._row(served))
        with self._lock:
            self._unwritten.append(mine)
            mine.leads, self._led = not self._led, True
        if not mine.leads:
            mine.woken.wait()
        if mine.leads:
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Write what waits, wake the threads whose rows these are, and let the first of those that came since go on."""
        with self._lock:
            written, self._unwritten = self._unwritten, []
        try:
            self._metrics.unrecorded.inc(self._store_rows([one.row for one in written]))
        finally:
            with self._lock:
                woken = [*written, *self._unwritten[:1]]
                for one in self._unwritten[:1]:
                    one.leads = True
                self._led = bool(self._unwritten)
            for one in woken:
                one.woken.set()

    def _store_rows(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows of requests in one transaction, or one by one where that fails; returns how many were lost."""
        try:
            with database.writing(self._store.engine) as session:
                session.execute(insert(RequestRow), list(rows))
        except (TunesmithError, SQLAlchemyError, OSError) as error:
            if isinstance(error, SQLAlchemyError) and len(rows) > 1:  # one of them has a value that does not fit
                return sum(self._store_rows([row]) for row in rows)
            LOG.exception("%d requests could not be recorded", len(rows))
            return len(rows)
        return 0

    def feedback(
        self, user: User, request: str, expected: str | None, given: Mapping[str, float], keep: bool = False
    ) -> FeedbackResult:
        """Add scores to a request: the given ones, or scores of its answer against the expected text.

        A score is never replaced. keep: store the request and the expected text as a case. Raises ApiError 404 for a
        request that the user's tenant did not make, 409 if it was scored before or its answer is no longer in memory,
        400 for an expected text that a scorer cannot use, 507 or 503 where the database is full or cannot be used.
        """
        with self._lock:
            held = self._answers.get(request)
        added = dict(given) if expected is None else self._scored(user, request, expected)
        try:
            self._add(user, request, added, held if keep else None, expected)
        except (TunesmithError, SQLAlchemyError, OSError) as error:
            LOG.exception("feedback to request %s could not be stored", request)
            raise not_stored(error) from error
        return FeedbackResult(
            request_id=request,
            scores=added,
            kept=True if keep else None,
            not_scored=self._not_scored(cut=held is not None and held.cut) if expected is not None else None,
        )

    def _add(
        self, user: User, request: str, added: Mapping[str, float], held: _Kept | None, expected: str | None
    ) -> None:
        """Store added scores. held: an answer that becomes a case with the expected text."""
        with database.writing(self._store.engine) as session:
            row = session.get(RequestRow, request)
            if row is None or row.tenant != user.tenant:
                raise _unknown(request)
            again = sorted(added.keys() & row.scores.keys())
            if again:
                raise ApiError(409, f"This request already has a score for {again[0]}.", code="already_scored")
            row.scores = {**row.scores, **added}
            row.features = {**row.features, "feedback_by": user.name}  # to trace a manipulated score to its user
            if held is not None and expected is not None:
                put_case(self._store, _case(row, user, held, expected))

    def _not_scored(self, *, cut: bool) -> dict[str, str] | None:
        """Metric -> why feedback did not score it."""
        reasons = dict.fromkeys((*self._scorers.every_answer, *self._scorers.with_reference), _CUT) if cut else {}
        return {**reasons, **self._scorers.unmeasured} or None

    def _scored(self, user: User, request: str, expected: str) -> dict[str, float]:
        with self._lock:
            held = self._answers.get(request)
        if held is None:
            with database.reading(self._store.engine) as session:
                row = session.get(RequestRow, request)
            if row is None or row.tenant != user.tenant:
                raise _unknown(request)
            raise ApiError(
                409,
                "The text of this answer is no longer in memory (only the newest answers are). "
                'Send {"score": {METRIC: 0..1}} instead of "expected".',
                code="answer_gone",
            )
        if held.cut:
            return {}
        if len(expected) * len(held.text) > limits.EXPECTED_BY_ANSWER:
            raise bad_request(
                f"The expected text ({len(expected)} characters) and the answer ({len(held.text)}) are too long to be "
                'compared here. Send {"score": {METRIC: 0..1}} instead of "expected".',
                "expected",
            )
        answered = Answered(held.text, expected, held.messages)
        try:
            return _scores(self._scorers.with_reference, answered, request)
        except TunesmithError as error:
            raise bad_request(error.what, "expected") from error

    def _keep(self, request: str, kept: _Kept) -> None:
        with self._lock:
            self._answers[request] = kept
            while len(self._answers) > self._most:
                self._answers.popitem(last=False)

    def _row(self, served: Served) -> dict[str, Any]:
        """The columns of a request's row."""
        completion, scores = served.completion, dict[str, float]()
        if completion is None:  # a failed request counts as a bad answer
            scores = dict.fromkeys(self._scorers.every_answer, 0.0)
        elif served.whole and not served.cut:
            try:
                scores = _scores(self._scorers.every_answer, Answered(completion.text, "", served.messages), served.id)
            except TunesmithError as error:  # it is still recorded, without a score
                LOG.warning("request %s was not scored: %s", served.id, error)
        features: dict[str, Any] = dict(served.features)
        if served.route.step is not None:
            features[STEP] = served.route.step
        return {
            "id": served.id,
            "at": stamp(),
            "name": served.route.name,
            "tenant": served.user.tenant,
            "region": self._region,
            "caller": served.user.name,
            "end_user": _end_user(served),
            "version": served.route.version.digest,
            "rollout": served.route.rollout,
            "arm": served.route.arm,
            "ok": completion is not None,
            "cut": served.cut,
            "seconds": served.seconds,
            "prompt_tokens": completion.prompt_tokens if completion else 0,
            "completion_tokens": completion.completion_tokens if completion else 0,
            "scores": scores,
            "features": features,
        }


def _scores(scorers: Mapping[str, Scoring], answered: Answered, request: str) -> dict[str, float]:
    return {metric: checked(scoring(answered), metric, f"request {request}") for metric, scoring in scorers.items()}


def _answered(served: Served) -> str:
    """The outcome of a request that did not fail."""
    if not served.whole:
        return "left"
    return "cut" if served.cut else "answered"


def _end_user(served: Served) -> str:
    if served.route.rollout is None or not served.end_user:
        return ""
    return end_user(served.route.rollout, served.user.name, served.end_user)


def _case(row: RequestRow, user: User, held: _Kept, expected: str) -> Case:
    return Case(
        request=row.id,
        messages=held.messages,
        expected=expected,
        answer=held.text,
        version=row.version,
        scores=dict(row.scores),
        by=user.name,
        tenant=row.tenant,
        region=row.region,
        at=stamp(),
    )


def _unknown(request: str) -> ApiError:
    return ApiError(404, f"There is no request {request[:80]!r}.", code="request_not_found", param="request_id")
