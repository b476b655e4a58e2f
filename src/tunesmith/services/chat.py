"""Ask candidates and versions directly: on the terminal, or several side by side in the console's playground.

What they answer here is no evidence: it is not measured, not recorded and not kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from sqlalchemy import select

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.access import Caller
from tunesmith.core.digests import is_digest
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress, Stopped
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.engines.protocol import Completion, Streamed
from tunesmith.pipeline.candidates import answerer, candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.serving import may_load
from tunesmith.registry.versions import Version, load_version, resolve
from tunesmith.store import database
from tunesmith.store.people.identities import User
from tunesmith.store.records import recalled
from tunesmith.store.store import Store
from tunesmith.store.tables import EdgeRow, VersionRow


class ChatAnswer(View):
    """One answer. finish: stop, or length if it reached max_tokens; sources: the retrieved texts."""

    answer: str
    finish: str
    candidate: str
    sources: tuple[str, ...]


class Choice(View):
    """A candidate of an evaluation. version: the newest version of it that the user's scope lets load, None without.

    digest: the candidate's record. refused: why the server cannot answer for it, None if it can.
    """

    name: str
    digest: str
    version: Version | None
    refused: str | None


@contextlib.contextmanager
def opened(project: Project, who: str, *, progress: Progress = SILENT) -> Iterator[Answerer]:
    """A candidate of the project, or a registered version, ready to answer. A version is verified first.

    who: a candidate's name, NAME@v1, an alias or the start of a digest. Raises UsageError where there is none.
    """
    training = PipelineContext(project, progress)
    context = PipelineContext(project.in_this_process(), progress) if training.ray else training
    if who in project.settings.candidates:
        yield answerer(context, load_candidate(project.store, candidate(training, who)))
        return
    if "@" not in who and not is_digest("sha256:" + who.removeprefix("sha256:").ljust(64, "0")):
        context.settings_of(who)  # raises an error that lists the candidates
    with verified_copy(project.store, resolve(project.store, who)) as loaded:
        if loaded.adapter is not None and loaded.candidate.training is not None:
            context.engine.load_adapter(loaded.candidate.training, loaded.adapter)
        engine = context.engine if loaded.candidate.asks_base else None
        yield Answerer(project.store, engine, loaded.candidate)


def ask(
    to: Answerer,
    message: str,
    *,
    caller: Caller | None = None,
    max_tokens: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> ChatAnswer:
    """The answer to one message. caller: who asks, by default whom evaluations stand for. max_tokens: a lower bound.

    stopped: asked after each piece of the answer; once it is true, the engine stops and Stopped is raised.
    """
    turn = [Message(role="user", content=message)]
    who = to.composer.asked_as if caller is None else caller
    found: Streamed | Completion | None = None
    for piece in to.responder.stream(to.generation(turn, who, max_tokens=max_tokens), to.candidate.training):
        found = piece
        if stopped():
            raise Stopped("the question was stopped")
    assert isinstance(found, Completion)  # the last item of a stream
    sources = tuple(to.composer.retrieved(turn, who).sources)
    return ChatAnswer(answer=found.text, finish=found.finish, candidate=to.candidate.name, sources=sources)


def choices(store: Store, user: User, region: str, base: str, evaluation: str) -> tuple[Choice, ...]:
    """The candidates of an evaluation. region, base: the server's. Expects that the user may see the evaluation."""
    measured = EvaluationBody.read(store, evaluation).candidates
    return tuple(_choice(store, user, region, base, name, one.candidate) for name, one in measured.items())


def _choice(store: Store, user: User, region: str, base: str, name: str, digest: str) -> Choice:
    candidate = load_candidate(store, digest)
    version, why = None, _why_not(candidate, base)
    if why is None:
        version, why = _loadable(store, Scope(user.tenant, region), digest)
        if version is None and why is None and user.scope != Scope():
            why = "no version of it is registered for you: it may answer with rows of other tenants"
        elif version is None and not candidate.tuned and why is None:
            why = _recalled(store, digest)
        elif version is None:
            why = why or "its weights are not registered as a version"
    return Choice(name=name, digest=digest, version=version, refused=why)


def _why_not(candidate: Candidate, base: str) -> str | None:
    if candidate.endpoint is not None:
        return "it is an endpoint of somebody else, which only evaluations ask"
    if candidate.asks_base and candidate.base != base:
        return "it was made for another base model than this server runs"
    return None


def _recalled(store: Store, digest: str) -> str | None:
    with database.reading(store.engine) as session:
        reason = recalled(session, digest)
    return None if reason is None else f"it was recalled: {reason}"


def _loadable(store: Store, scope: Scope, candidate: str) -> tuple[Version | None, str | None]:
    """The newest version of a candidate that a scope may load; without one, why the newest of the scope may not."""
    own = {"tenant": ("", scope.tenant), "region": ("", scope.region)}
    query = select(VersionRow.digest).join(EdgeRow, EdgeRow.child == VersionRow.digest)
    query = query.where(EdgeRow.parent == candidate, EdgeRow.role == "candidate")
    query = query.where(VersionRow.tenant.in_(own["tenant"]), VersionRow.region.in_(own["region"]))
    first = None
    with database.reading(store.engine) as session:
        for digest in session.scalars(query.order_by(VersionRow.number.desc(), VersionRow.name)).all():
            try:
                version = load_version(store, digest, session)
                permission = may_load(session, version, scope)
            except Refused as error:
                first = first or error.what
                continue
            if permission.granted:
                return version, None
            first = first or f"{version.label} {permission.message}"
    return None, first
