"""What happens in service: jobs, rollouts, held answers, feedback, recalls, drift, webhooks, audit log and people."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Query, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from tunesmith.core.values import Frozen
from tunesmith.server import limits
from tunesmith.server.answering.recording import FeedbackResult, Withdrawal
from tunesmith.server.api.routing import CHANGE, ApiRouter, Number, Position, Text
from tunesmith.server.chat.answer import ID_PREFIX
from tunesmith.server.errors import unknown_request
from tunesmith.server.openapi import answers, body
from tunesmith.server.serving import Calling, document, needs, read
from tunesmith.services import audit, erasure, home, jobs, monitoring, review, rollouts, storage, users

if TYPE_CHECKING:
    from tunesmith.monitoring.pruning import Usage
    from tunesmith.monitoring.recall import RecallStatus
    from tunesmith.rollout.course import RolloutCourse

routes = ApiRouter()
Metric = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Score = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Value = Annotated[str, Query(min_length=1, max_length=300)]
Cause = Annotated[
    str, Query(pattern=f"^({'|'.join(monitoring.CAUSES)})$", json_schema_extra={"enum": [*monitoring.CAUSES]})
]
_JOB, _ROLLOUT = "/jobs/{number}", "/rollouts/{number}"
_MOST_JOBS, _MOST_ENTRIES = 100, 1000  # of an answer


@routes.shows("/jobs", "read", "jobs")
def job_list(
    call: Calling, before: Position | None = None, most: Annotated[int, Query(ge=1)] = _MOST_JOBS
) -> jobs.JobList:
    """The jobs of the caller's tenant and region, newest first. before: only those with a lower number; most: how many,
    100 by default and at most."""
    return jobs.list_jobs(call, before=before, most=min(most, _MOST_JOBS))


@routes.shows(_JOB, "read", "jobs")
def job(call: Calling, number: Number) -> jobs.JobView:
    """One job: its state, the step that it is at, the time left for this step, its result or its error. Another
    tenant's job is answered like one that does not exist."""
    return jobs.show(call, number)


@routes.shows(_JOB + "/log", "read", "jobs")
def log(call: Calling, number: Number, after: Position = 0) -> jobs.JobLog:
    """The lines of a job's log, oldest first. after: only those with a higher number. Tracebacks and paths of the
    server are shown to its engineers, operators and admins, and not to those of one tenant or region."""
    return jobs.log(call, number, after=after)


@routes.shows(_JOB + "/curves", "read", "jobs")
def curves(call: Calling, number: Number) -> jobs.JobCurves:
    """The losses and scores of a job's trainings, also while it runs, with the time and memory that were predicted."""
    return jobs.curves(call, number)


@routes.shows("/rollouts", "read")
def rollout_list(call: Calling) -> rollouts.RolloutList:
    """The rollouts of the caller's tenant and region, newest first."""
    return rollouts.status(call)


@routes.shows(_ROLLOUT, "read")
def rollout(call: Calling, number: Number) -> rollouts.RolloutView:
    """One rollout. Another tenant's rollout is answered like one that does not exist."""
    return rollouts.one_visible_to(call, number)


@routes.shows(_ROLLOUT + "/course", "read", gives=rollouts.course)
def course(call: Calling, number: Number) -> RolloutCourse:
    """Traffic by version over time, each step's evidence as it grew, and who did what."""
    return rollouts.course(call, number)


@routes.shows("/held", "chat", "decisions")
def held_answers(call: Calling, everything: Literal["true", "false"] = "false") -> review.HeldList:
    """The answers that wait: the caller's own, and those of their tenant and region if they may review and the token
    has the scope decisions. everything:
    `true` lists decided ones too, until they are deleted. Without texts."""
    return review.list_held(call, everything=everything == "true")


@routes.shows("/held/{identifier}", "chat", "decisions")
def held_answer(call: Calling, identifier: str) -> review.HeldAnswerView:
    """One answer. `completion` is there once it may leave; reviewers also see the conversation and what waits. An
    answer that the caller may not see is answered like one that does not exist."""
    return review.show_held(call, identifier)


class Feedback(Frozen):
    """The expected text of an answer, or scores that were given elsewhere.

    request_id: a completion's id (`chatcmpl-...`) or the x-request-id header. keep: store the texts of the request, of
    its answer and of the expected one for a review, where the server's project allows that.
    """

    request_id: str = Field(min_length=1, max_length=limits.REQUEST_ID)
    expected: Annotated[str, Field(max_length=limits.EXPECTED)] | None = None
    keep: bool = False
    score: dict[Metric, Score] | None = Field(default=None, min_length=1, max_length=limits.SCORES)

    @model_validator(mode="after")
    def _one_of(self) -> Feedback:
        if (self.expected is None) == (self.score is None):
            raise ValueError("give either expected or score")
        return self


@routes.post("/feedback", dependencies=[needs("feedback")], **answers(FeedbackResult, *CHANGE, extra=body(Feedback)))
async def feedback(request: Request, call: Calling) -> Response:
    """Score a request of the caller's tenant. Each metric can be scored once."""
    given = await read(request, call, Feedback)
    identifier, serving = given.request_id.removeprefix(ID_PREFIX), call.serving
    score = partial(serving.recorder.feedback, call.user, identifier, given.expected, given.score or {}, given.keep)
    threads = serving.noting if given.expected is None and not given.keep else serving.scoring
    return document(await threads.run(call.actor, score))


@routes.delete("/feedback/{request_id}", dependencies=[needs("feedback")], **answers(Withdrawal, *CHANGE))
async def withdraw(call: Calling, request_id: str) -> Response:
    """Delete the kept text of a request that the caller made, and let none be kept from now on."""
    identifier = request_id.removeprefix(ID_PREFIX)
    if not re.fullmatch("[0-9a-f]{32}", identifier):
        raise unknown_request(identifier)
    act = partial(call.serving.recorder.withdraw, call.user, identifier)
    return document(await call.serving.noting.run(call.actor, act))


@routes.shows("/recalls", "read", whole=True)
def recalls(call: Calling) -> monitoring.RecallList:
    """What was recalled and why, newest first."""
    return monitoring.list_recalls(call.store)


@routes.shows("/recalls/pending", "read", whole=True)
def pending(call: Calling) -> monitoring.PendingRetrains:
    """The names whose recalled version is not replaced yet."""
    return monitoring.list_pending_retrains(call.store)


@routes.shows("/recalls/status", "read", whole=True, gives=monitoring.recall_status_of)
def recall_status(call: Calling, kind: Cause, value: Value) -> RecallStatus:
    """Whether something that was recalled is gone."""
    return monitoring.recall_status_of(call.store, kind, value)


@routes.shows("/erasures", "read", whole=True)
def erasures(call: Calling) -> erasure.ErasurePlans:
    """What was erased, and the plans that wait for a second person, newest first."""
    return erasure.list_erasures(call.store)


@routes.shows("/usage", "read", slow=True, whole=True, gives=storage.usage)
def usage(call: Calling) -> Usage:
    """What takes the space of the store and of the server's machine."""
    return storage.usage(call.store)


@routes.shows("/impact", "read", whole=True)
def impact(call: Calling, base: Value) -> monitoring.Impact:
    """What depends on a base. base: as a project file names it, or the start of its digest."""
    return monitoring.impact(call.store, base)


@routes.shows("/drift", "read", whole=True, slow=True)
def drift(call: Calling) -> monitoring.Drift:
    """Whether requests to the project's champion drifted; with kept requests as examples for who may review rows, if
    the token has the scope rows."""
    return monitoring.drift(call)


@routes.shows("/retraining", "read", whole=True, slow=True)
def due(call: Calling) -> monitoring.Retraining:
    """Why a new version is due, and the runs that were queued for it."""
    return monitoring.look(call.project)


@routes.shows("/webhooks", "read", whole=True)
def hooks(call: Calling) -> monitoring.WebhookList:
    """The project's webhooks, and deliveries that failed."""
    return monitoring.list_webhooks(call.project)


@routes.shows("/status", "read", slow=True)
def status(call: Calling) -> home.Home:
    """What serves, what moves, what waits for whom, and health, for the caller's tenant and region."""
    return home.home(call) if call.serving.project is None else home.status(call)


@routes.shows("/audit", "read", whole=True)
def audit_log(
    call: Calling,
    subject: Text = "",
    action: Text = "",
    search: Text = "",
    before: Annotated[int | None, Query(ge=0, lt=2**62)] = None,
    most: Annotated[int, Query(ge=1, le=_MOST_ENTRIES)] = 50,
) -> audit.AuditLog:
    """The newest entries of the audit log that match, oldest first. search: in names, actions, subjects and details.

    before: only entries with a smaller number; total counts the others too.
    """
    return audit.show_audit(call.store, subject=subject, action=action, containing=search, before=before, limit=most)


@routes.shows("/users", "read")
def everybody(call: Calling) -> users.UserList:
    """For an admin of all tenants and regions everybody, for others themselves."""
    return users.list_users(call)


@routes.shows("/keys", "read")
def keys(call: Calling) -> users.KeyList:
    """Enrolled and proposed keys: for an admin of all tenants and regions everybody's, for others their own.

    Keys are proposed and confirmed in the console or on the command line, where the log knows who opened the session.
    """
    return users.list_keys(call)


@routes.shows("/tokens", "tokens")
def tokens(call: Calling, user: str | None = None) -> users.TokenList:
    """The caller's tokens, and for an admin everybody's. user: only that user's."""
    return users.list_tokens(call, user=user)
