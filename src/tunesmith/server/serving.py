"""What the routes share: the parts of a running server, and how an action is performed for all of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from fastapi import Request

from tunesmith.core.errors import NotThere
from tunesmith.engines.protocol import Engine
from tunesmith.holding.rules import Holder
from tunesmith.monitoring.keeping import CaseKeeper
from tunesmith.project import Project
from tunesmith.rollout.controller import give_up
from tunesmith.server import limits
from tunesmith.server.answering.job import AwaitedDecisions
from tunesmith.server.answering.recording import Recorder
from tunesmith.server.answering.routing import ReadyVersions, Router
from tunesmith.server.answering.work import AnsweringThreads, Prompts
from tunesmith.server.draining import Drain
from tunesmith.server.intake.rates import Arriving, Rates
from tunesmith.server.limits import ServerSettings
from tunesmith.server.metrics import Metrics
from tunesmith.server.turns import SharedThreads
from tunesmith.services.actions import Acting, Action
from tunesmith.services.held import HeldAnswerView
from tunesmith.services.rollouts import ServedScorers
from tunesmith.store.people.identities import User
from tunesmith.store.people.tokens import Token
from tunesmith.store.store import Store

_FEEDBACK = "calls of feedback"
# Where the chat route leaves its Job in the ASGI scope, for the request's trace.
CHAT_JOB = "tunesmith.job"
# A field of a request in an action's path.
FIELD = re.compile(r"\{(\w+)\}")


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

    def __init__(
        self,
        store: Store,
        engine: Engine,
        prompts: Prompts,
        settings: ServerSettings = ServerSettings(),
        *,
        scorers: ServedScorers = ServedScorers(),
        project: Project | None = None,
        keeper: CaseKeeper | None = None,
        holder: Holder | None = None,
    ) -> None:
        """Make the parts. prompts: the base's Renderer. scorers: the task's, as `served_scorers` sorts them.

        keeper: keeps requests for a review where callers ask for it; None: no text is kept. holder: says which answers
        wait for a reviewer; None: none does.
        """
        self.store, self.settings, self.project = store, settings, project
        self.holding = None if holder is None else holder.settings
        self.metrics = Metrics()
        self.versions = ReadyVersions(store, engine)
        self.router = Router(store, settings.region, self.versions)
        self.recorder = Recorder(store, self.metrics, settings, scorers, keeper)
        self.worker = AnsweringThreads(
            self.versions, self.router, self.recorder, settings, partial(give_up, store), prompts, holder
        )
        self.metrics.watch_queue(self.worker.waiting)
        self.arriving, self.rates = Arriving(settings), Rates(settings)
        self.awaited, self.drain, self.checked_at = AwaitedDecisions(), Drain(), 0.0
        self.scoring = SharedThreads("scoring", 1, limits.FEEDBACK, _FEEDBACK)
        self.noting = SharedThreads("noting", 2, limits.FEEDBACK, _FEEDBACK)
        self.listing = SharedThreads("listing", 2, limits.LISTS, "lists")
        self.pages = SharedThreads("pages", 2, limits.PAGES, "pages")
        self.trying = SharedThreads("trying", 4, 1, "questions of the playground")
        self.files = SharedThreads("files", limits.UPLOADS, limits.LISTS, "calls for files")
        self.oidc: Any = None
        self.uploads, self.streams = Counter[str](), Counter[str]()
        self.used: dict[str, float] = {}

    def own_project(self) -> Project:
        """The project. Raises NotThere where the server has none."""
        if self.project is None:
            raise NotThere("this server has no project", code="no_project")
        return self.project

    def arrives(self, user: User) -> AbstractContextManager[Callable[[int], None]]:
        """Count a request of the user while its body is read (`Arriving.one`)."""
        return self.arriving.one(user.name, self.worker.held_by(user.name))

    async def perform(
        self, action: Action[Any, Any], asked: Any, user: User, *, session: str = "", token: Token | None = None
    ) -> Any:
        """What an action returns. session: of the console; token: of a caller of /api."""
        acting = Acting(self.store, user, self.own_project, session, token)
        threads = self.files if action.reads_files else self.noting
        done = await threads.run(user.name, partial(action, acting, asked))
        if isinstance(done, HeldAnswerView):  # it was decided on here: its request waits
            self.metrics.held.labels(done.state).inc()
            self.awaited.tell(done.id)
        return done

    def stop_threads(self) -> None:
        """Begin no more calls on the threads that users share."""
        for threads in (self.scoring, self.noting, self.listing, self.pages, self.trying, self.files):
            threads.stop()


def serving_of(request: Request) -> Serving:
    """The server that received a request."""
    found = request.app.state.serving
    assert isinstance(found, Serving)
    return found
