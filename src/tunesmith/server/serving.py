"""What the routes share: the parts of a running server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from tunesmith.core.errors import NotThere
from tunesmith.holding.settings import HoldSettings
from tunesmith.project import Project
from tunesmith.server import limits
from tunesmith.server.answering.job import AwaitedDecisions
from tunesmith.server.answering.recording import Recorder
from tunesmith.server.answering.routing import ReadyVersions, Router
from tunesmith.server.answering.work import AnsweringThreads
from tunesmith.server.draining import Drain
from tunesmith.server.intake.arriving import Arriving
from tunesmith.server.intake.rates import Rates
from tunesmith.server.metrics import Metrics
from tunesmith.server.settings import ServerSettings
from tunesmith.server.shared_threads import SharedThreads
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store

_FEEDBACK = "calls of feedback"
# Where the chat route leaves its Job in the ASGI scope, for the request's trace.
CHAT_JOB = "tunesmith.job"


@dataclass(slots=True)
class Serving:
    """One server's parts. checked_at: monotonic time at which the controller's last round ended.

    scoring: the one thread that compares answers with expected texts, which takes some scorers seconds. noting: the
    threads for feedback that brings its own scores. listing: those for lists of models and rollouts.
    pages: those for the console's pages.
    versions: those that the engine holds. trying: the few threads for questions of the playground.
    project: takes fine-tuning jobs; None: the server takes none. holding: how long answers wait for a reviewer; None:
    none does. awaited: the requests that wait for a decision. oidc: authlib's client of the
    project's identity provider, once somebody logs in by it. uploads: the uploads under way, by user. streams:
    the streams of jobs' events that are open, by user. files:
    threads that write uploads and delete files. used: when tokens, by their digests, were used since this was last
    written to the database, in seconds since 1970.
    """

    store: Store
    settings: ServerSettings
    metrics: Metrics
    versions: ReadyVersions
    router: Router
    recorder: Recorder
    worker: AnsweringThreads
    arriving: Arriving
    rates: Rates
    project: Project | None = None
    holding: HoldSettings | None = None
    awaited: AwaitedDecisions = field(default_factory=AwaitedDecisions)
    drain: Drain = field(default_factory=Drain)
    checked_at: float = 0.0
    scoring: SharedThreads = field(default_factory=lambda: SharedThreads("scoring", 1, limits.FEEDBACK, _FEEDBACK))
    noting: SharedThreads = field(default_factory=lambda: SharedThreads("noting", 2, limits.FEEDBACK, _FEEDBACK))
    listing: SharedThreads = field(default_factory=lambda: SharedThreads("listing", 2, limits.LISTS, "lists"))
    pages: SharedThreads = field(default_factory=lambda: SharedThreads("pages", 2, limits.PAGES, "pages"))
    trying: SharedThreads = field(default_factory=lambda: SharedThreads("trying", 4, 1, "questions of the playground"))
    files: SharedThreads = field(
        default_factory=lambda: SharedThreads("files", limits.UPLOADS, limits.LISTS, "calls for files")
    )
    oidc: Any = None
    uploads: Counter[str] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)
    used: dict[str, float] = field(default_factory=dict)

    def own_project(self) -> Project:
        """The project. Raises NotThere where the server has none."""
        if self.project is None:
            raise NotThere("this server has no project", code="no_project")
        return self.project

    def arrives(self, user: User) -> AbstractContextManager[Callable[[int], None]]:
        """Count a request of the user while its body is read (`Arriving.one`)."""
        return self.arriving.one(user.name, self.worker.held_by(user.name))


def serving_of(request: Request) -> Serving:
    """The server that received a request."""
    found = request.app.state.serving
    assert isinstance(found, Serving)
    return found
