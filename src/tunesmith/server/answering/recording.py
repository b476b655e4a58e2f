"""Records of served requests: measurements in the database, the newest answers in memory only.

The text of a request is stored only where its caller asks for that and the project allows it, after the privacy scan
and for a limited time (monitoring/keeping.py). Rows are written many in one transaction, before their answers leave.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.clock import stamp
from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.values import Omitted, View
from tunesmith.data.review.queue import forget_cases
from tunesmith.engines.protocol import Completion
from tunesmith.evaluation.metrics.declared import Answered, Scoring, checked
from tunesmith.monitoring.cases import Case, delete_case, put_case
from tunesmith.monitoring.keeping import CaseKeeper, CaseTexts, NotKept
from tunesmith.rollout.served_scorers import ServedScorers
from tunesmith.rollout.traffic import LEFT, STEP, UNLOADED, end_user
from tunesmith.server import limits
from tunesmith.server.answering.job import ChatJob
from tunesmith.server.errors import ApiError, bad_request, forbidden, not_stored, unknown_request
from tunesmith.server.limits import ServerSettings
from tunesmith.server.metrics import Metrics
from tunesmith.store import audit, database
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

LOG = logging.getLogger("tunesmith.server")
_WITHDRAWN = "withdrawn"  # among a row's features: its caller no longer lets the text be kept
_WAITING = 64  # rows that wait to be written; a thread that brings more waits
_AT_ONCE = 64  # failed requests that wait to be scanned; more are lost, and counted


class _Kept(NamedTuple):
    """An answer in memory that feedback may score. cut: see `ChatJob.cut`. store: its caller lets the text be kept."""

    tenant: str
    caller: str
    messages: tuple[Message, ...]
    text: str
    cut: bool
    store: bool


_CUT = "max_tokens, stop text, format or tools of the request shaped the answer, so it says nothing about the version"


class FeedbackResult(View):
    """The scores that feedback added. kept: whether the request was stored as a case, where its caller asked for that.

    not_kept: why not. not_scored: metric of the task -> why the server cannot compute it from the expected text.
    """

    request_id: str
    scores: dict[str, float]
    kept: Omitted[bool] = None
    not_kept: Omitted[str] = None
    not_scored: Omitted[dict[str, str]] = None


class Withdrawal(View):
    """A request whose text may no longer be kept. deleted: whether it was kept until now.

    Where it is false, the text was never kept, its time was over, or a person already made a row of a source of it.
    """

    request_id: str
    deleted: bool


class Recorder:
    """Records requests and their scores.

    scorers: some apply to every answer, others need the expected text, which feedback gives. keeper: prepares texts
    that callers ask to keep; None: the project allows none.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        settings: ServerSettings,
        scorers: ServedScorers,
        keeper: CaseKeeper | None,
    ) -> None:
        self._store, self._metrics, self._settings = store, metrics, settings
        self._scorers, self._keeper = scorers, keeper
        self._keeping = ThreadPoolExecutor(1, "tunesmith-keeping")
        self._waiting = threading.BoundedSemaphore(_AT_ONCE)
        self._answers: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._rows = RequestRows(store, metrics.unrecorded.inc)

    def write(
        self,
        job: ChatJob,
        completion: Completion | None,
        then: Callable[[], object] | None = None,
        *,
        whole: bool = True,
    ) -> None:
        """Record a request, then call `then`, in any thread; without it, return once it is recorded.

        completion: None if it failed. whole: it was decoded to its end, so it can be scored; False if the client left
        earlier. If recording fails, `then` is called all the same, and a metric counts the loss.
        """
        if then is None:
            done = threading.Event()
            self.write(job, completion, done.set, whole=whole)
            done.wait()
            return
        job.ended, job.completion = time.monotonic(), completion
        cut = completion is not None and job.cut(completion)
        row = self._row(job, completion, job.ended - job.accepted, cut=cut, whole=whole)
        outcome = "failed" if completion is None else "left" if not whole else "cut" if cut else "answered"
        models = (job.request.model, job.route.version.label)
        self._metrics.request(job.route.arm, outcome, row["seconds"], completion, models)
        stored = bool(job.request.store) and self.keeps
        if completion is not None and whole:
            kept = _Kept(job.user.tenant, job.user.name, job.request.conversation, completion.text, cut, stored)
            with self._lock:
                self._answers[job.id] = kept
                while len(self._answers) > self._settings.kept_answers:
                    self._answers.popitem(last=False)
        failed = completion is None or any(value < 1.0 for value in row["scores"].values())
        self._rows.write(row, then, *([partial(self._keep_later, job)] if stored and failed else []))

    def stop(self, seconds: float) -> None:
        """Write what waits to be written, and keep what waits to be kept, for at most this many seconds."""
        self._rows.stop(seconds)
        wait([self._keeping.submit(int)], seconds)  # done when everything before it is
        self._keeping.shutdown(wait=False, cancel_futures=True)

    @property
    def keeps(self) -> bool:
        """Whether the project keeps requests that ask for it."""
        return self._keeper is not None

    def feedback(
        self, user: User, request: str, expected: str | None, given: Mapping[str, float], keep: bool = False
    ) -> FeedbackResult:
        """Add scores to a request: the given ones, or scores of its answer against the expected text.

        A score is never replaced. keep: store the request and the expected text as a case; so does a request with
        `store` whose answer was wrong. Raises ApiError 404 for a request that the user's tenant did not make, 403 for
        keep and a request of another user, 409 if it was scored before, its answer was cut off or is no longer in
        memory, 400 for an expected text that a scorer cannot use, 507 or 503 where the database is full or cannot be
        used.
        """
        if keep and not self.keeps:
            what = "This server keeps no requests: its project file has no `cases:`. Nothing was done; leave keep out."
            raise ApiError(400, what, "storing_not_allowed", "keep")
        with self._lock:
            held = self._answers.get(request)
        if held is not None and held.tenant != user.tenant:
            raise unknown_request(request)
        if keep and held is not None and held.caller != user.name:
            raise forbidden("Only the user who made this request may ask to keep it. Nothing was done.")
        added = dict(given) if expected is None else self._scored(user, held, request, expected)
        wrong = not added or any(value < 1.0 for value in added.values())
        wanted = keep or (held is not None and held.store and wrong)
        texts, not_kept = self._texts(held, expected) if wanted else (None, None)
        try:
            kept = self._add(user, request, added, texts)
        except (TunesmithError, SQLAlchemyError, OSError) as error:
            LOG.exception("feedback to request %s could not be stored", request)
            raise not_stored(error) from error
        if wanted:
            self._metrics.cases.labels("kept" if kept else "refused").inc()
        return FeedbackResult(
            request_id=request,
            scores=added,
            kept=kept if wanted else None,
            not_kept=None if kept or not wanted else not_kept or "its caller withdrew it",
            not_scored=self._not_scored(cut=held is not None and held.cut) if expected is not None else None,
        )

    def withdraw(self, user: User, request: str) -> Withdrawal:
        """Delete the kept text of a request, and let none be kept from now on.

        Raises ApiError 404 for a request that the user did not make, 507 or 503 as `feedback` does.
        """
        with self._lock:
            held = self._answers.get(request)
            if held is not None:
                self._answers[request] = held._replace(store=False)
        try:
            with database.writing(self._store.engine) as session:
                row = session.get(RequestRow, request)
                if row is None or (row.tenant, row.caller) != (user.tenant, user.name):
                    raise unknown_request(request)
                again = _WITHDRAWN in row.features
                row.features = {**row.features, _WITHDRAWN: True}
                forget_cases(session, [request])
                deleted = delete_case(self._store, request)
                if deleted or not again:
                    detail = {"deleted": deleted}
                    audit.append(session, actor=user.name, action="cases.withdraw", subject=request, detail=detail)
        except (TunesmithError, SQLAlchemyError, OSError) as error:
            LOG.exception("the text of request %s could not be withdrawn", request)
            raise not_stored(error) from error
        return Withdrawal(request_id=request, deleted=deleted)

    def _texts(self, held: _Kept | None, expected: str | None) -> tuple[CaseTexts | None, str | None]:
        """The texts of a case, or why there are none."""
        assert self._keeper is not None
        if held is None:
            return None, "its text is no longer in memory (only the newest answers are)"
        try:
            return self._keeper.scanned(held.messages, held.text, expected), None
        except NotKept as error:
            return None, str(error)

    def _keep_later(self, job: ChatJob) -> None:
        """Keep a failed request, in a thread of its own: the scan takes time, and the answer need not wait for it."""
        if not self._waiting.acquire(blocking=False):
            self._metrics.cases.labels("lost").inc()
            return
        try:
            self._keeping.submit(self._keep_failed, job).add_done_callback(lambda _done: self._waiting.release())
        except RuntimeError:  # the server has stopped
            self._metrics.cases.labels("lost").inc()

    def _keep_failed(self, job: ChatJob) -> None:
        assert self._keeper is not None
        outcome, answer = "lost", job.completion.text if job.completion else None
        try:
            texts = self._keeper.scanned(job.request.conversation, answer, None)
            with database.writing(self._store.engine) as session:
                row = session.get(RequestRow, job.id)
                outcome = "kept" if row is not None and self._put(row, job.user, texts) else "refused"
        except NotKept as error:
            outcome = "refused"
            LOG.info("request %s was not kept: %s", job.id, error)
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it
            LOG.error("request %s could not be kept: %s", job.id, type(error).__name__)  # its message may hold the text
        finally:
            self._metrics.cases.labels(outcome).inc()

    def _put(self, row: RequestRow, user: User, texts: CaseTexts) -> bool:
        """Store a case, unless its caller withdrew it; returns whether it was stored."""
        assert self._keeper is not None
        if _WITHDRAWN in row.features:
            return False
        case = Case.of(
            row,
            request=row.id,
            messages=texts.messages,
            expected=texts.expected,
            answer=texts.answer,
            by=user.name,
            until=self._keeper.until(row.at),
        )
        put_case(self._store, case)
        return True

    def _add(self, user: User, request: str, added: Mapping[str, float], texts: CaseTexts | None) -> bool:
        """Store added scores. texts: of a case to be stored with them. Returns whether it was."""
        with database.writing(self._store.engine) as session:
            row = session.get(RequestRow, request)
            if row is None or row.tenant != user.tenant:
                raise unknown_request(request)
            if added and row.cut:
                raise ApiError(409, f"No score was stored: {_CUT}.", "answer_cut")
            again = sorted(added.keys() & row.scores.keys())
            if again:
                raise ApiError(409, f"This request already has a score for {again[0]}.", "already_scored")
            row.scores = {**row.scores, **added}
            row.features = {**row.features, "feedback_by": user.name}  # to trace a manipulated score to its user
            return texts is not None and self._put(row, user, texts)

    def _not_scored(self, *, cut: bool) -> dict[str, str] | None:
        """Metric -> why feedback did not score it."""
        reasons = dict.fromkeys((*self._scorers.every_answer, *self._scorers.with_reference), _CUT) if cut else {}
        return {**reasons, **self._scorers.unmeasured} or None

    def _scored(self, user: User, held: _Kept | None, request: str, expected: str) -> dict[str, float]:
        if held is None:
            with database.reading(self._store.engine) as session:
                row = session.get(RequestRow, request)
            if row is None or row.tenant != user.tenant:
                raise unknown_request(request)
            raise ApiError(
                409,
                "The text of this answer is no longer in memory (only the newest answers are). "
                'Send {"score": {METRIC: 0..1}} instead of "expected".',
                "answer_gone",
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

    def _row(
        self, job: ChatJob, completion: Completion | None, seconds: float, *, cut: bool, whole: bool
    ) -> dict[str, Any]:
        """The columns of a request's row."""
        route, user, scores = job.route, job.request.user, dict[str, float]()
        if completion is None:  # a failed request counts as a bad answer
            scores = dict.fromkeys(self._scorers.every_answer, 0.0)
        elif whole and not cut:
            try:
                answered = Answered(completion.text, "", job.request.conversation)
                scores = _scores(self._scorers.every_answer, answered, job.id)
            except TunesmithError as error:  # it is still recorded, without a score
                LOG.warning("request %s was not scored: %s", job.id, error)
        features: dict[str, Any] = dict(job.features)
        if route.step is not None:
            features[STEP] = route.step
        if route.unloaded:
            features[UNLOADED] = True
        if completion is not None and not whole and not completion.text:
            features[LEFT] = True
        return {
            "id": job.id,
            "at": stamp(),
            "name": route.version.name,
            "tenant": job.user.tenant,
            "region": self._settings.region,
            "caller": job.user.name,
            "end_user": end_user(route.rollout, job.user.name, user) if route.rollout is not None and user else "",
            "version": route.version.digest,
            "rollout": route.rollout,
            "arm": route.arm,
            "ok": completion is not None,
            "cut": cut,
            "seconds": seconds,
            "prompt_tokens": completion.prompt_tokens if completion else 0,
            "completion_tokens": completion.completion_tokens if completion else 0,
            "scores": scores,
            "features": features,
        }


def _scores(scorers: Mapping[str, Scoring], answered: Answered, request: str) -> dict[str, float]:
    return {metric: checked(scoring(answered), metric, f"request {request}") for metric, scoring in scorers.items()}


class RequestRows:
    """Rows that are written as they come. Thread-safe. lost: called with how many rows could not be written.

    A thread that finds another one writing leaves its row and goes on. The rows that gather share a transaction.
    """

    def __init__(self, store: Store, lost: Callable[[int], object]) -> None:
        self._store, self._lost = store, lost
        self._lock = threading.Lock()
        self._waiting: list[tuple[Mapping[str, Any], list[Callable[[], object]]]] = []  # rows, and calls after each
        self._writing = False  # a thread writes
        self._writer = ThreadPoolExecutor(1, "tunesmith-recording")

    def write(self, row: Mapping[str, Any], *after: Callable[[], object]) -> None:
        """Write a row, then make calls, in any thread; they are made for a lost row too."""
        calls, written = list(after), None
        with self._lock:
            leads, self._writing = not self._writing, True
            if not leads and len(self._waiting) >= _WAITING:
                written = threading.Event()
                calls.append(written.set)
            self._waiting.append((row, calls))
        if leads and self._write_waiting():
            # Other rows came meanwhile. They must not keep this thread from its next request.
            try:
                self._writer.submit(self._write_all)
            except RuntimeError:  # the server has stopped
                self._write_all()
        elif written is not None:
            written.wait()

    def waiting(self) -> int:
        """How many rows no thread has begun to write."""
        return len(self._waiting)

    def stop(self, seconds: float) -> None:
        """Write what waits, for at most this many seconds."""
        wait([self._writer.submit(int)], seconds)  # done when everything before it is
        self._writer.shutdown(wait=False)

    def _write_all(self) -> None:
        while self._write_waiting():
            pass

    def _write_waiting(self) -> bool:
        """Write the rows that wait, and make the calls after each; returns whether others have come since."""
        with self._lock:
            written, self._waiting = self._waiting, []
        try:
            if lost := self.store([row for row, _ in written]):
                self._lost(lost)
        finally:
            for _, calls in written:
                for call in calls:
                    call()
            with self._lock:
                more = self._writing = bool(self._waiting)
        return more

    def store(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows in one transaction, or one by one where that fails; returns how many were lost."""
        try:
            database.append(self._store.engine, RequestRow, rows)
        except Exception as error:  # their answers wait for it
            if isinstance(error, SQLAlchemyError) and len(rows) > 1:  # one of them has a value that does not fit
                return sum(self.store([row]) for row in rows)
            LOG.exception("%d requests could not be recorded", len(rows))
            return len(rows)
        return 0
