"""What the routes share: the parts of a running server, who may call, and how an action is performed for all of them.

Every route declares who may call it as a dependency: a token of a scope, a session, or nobody's permission. A route
without such a declaration fails a test.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from tunesmith.core.errors import NotThere
from tunesmith.core.reading.strict_json import Fields
from tunesmith.engines.protocol import Engine
from tunesmith.holding.rules import Holder
from tunesmith.monitoring.keeping import CaseKeeper
from tunesmith.project import Project
from tunesmith.rollout.controller import give_up
from tunesmith.rollout.served_scorers import ServedScorers
from tunesmith.server import limits
from tunesmith.server.answering.job import AwaitedDecisions
from tunesmith.server.answering.recording import Recorder
from tunesmith.server.answering.routing import ReadyVersions, Router
from tunesmith.server.answering.work import AnsweringThreads, Prompts
from tunesmith.server.draining import Drain
from tunesmith.server.errors import ApiError, bad_request, capital, forbidden, unauthorised
from tunesmith.server.intake.body import read_body
from tunesmith.server.intake.rates import Arriving, Rates
from tunesmith.server.limits import ServerSettings
from tunesmith.server.metrics import Metrics
from tunesmith.server.turns import SharedThreads
from tunesmith.services.actions import Acting, Action
from tunesmith.services.review import HeldAnswerView
from tunesmith.store.people.identities import User
from tunesmith.store.people.roles import TokenScope
from tunesmith.store.people.tokens import Caller, Token
from tunesmith.store.store import Store

_FEEDBACK = "calls of feedback"
# Where the chat route leaves its Job in the ASGI scope, for the request's trace.
CHAT_JOB = "tunesmith.job"
# A field of a request in an action's path.
FIELD = re.compile(r"\{(\w+)\}")


class Serving:
    """One server's parts. checked_at: monotonic time at which the controller's last round ended.

    scoring: the one thread that compares answers with expected texts, which takes some scorers seconds. noting: the
    threads for feedback that brings its own scores. listing: those for lists, such as that of models.
    pages: those for the console's pages.
    versions: those that the engine holds. trying: the few threads for questions of the playground.
    project: takes fine-tuning jobs; None: the server takes none. holding: how long answers wait for a reviewer; None:
    none does. awaited: the requests that wait for a decision. oidc: authlib's client of the
    project's identity provider, once somebody logs in by it. uploads: the uploads under way, by user. streams:
    the streams of jobs' events that are open, by user. files: threads for what reads or writes files, or takes seconds
    to compute. used: when tokens, by their digests, were used since this was last
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
        others: Sequence[tuple[Engine, Prompts]] = (),
    ) -> None:
        """Make the parts. prompts: the base's Renderer. scorers: the task's, as `served_scorers` sorts them.

        keeper: keeps requests for a review where callers ask for it; None: no text is kept. holder: says which answers
        wait for a reviewer; None: none does. others: engine and Renderer of further bases.
        """
        self.store, self.settings, self.project = store, settings, project
        self.holding = None if holder is None else holder.settings
        self.metrics = Metrics()
        served = [(engine, prompts), *others]
        self.versions = ReadyVersions(store, *(each for each, _ in served))
        self.router = Router(store, settings.region, self.versions)
        self.recorder = Recorder(store, self.metrics, settings, scorers, keeper)
        self.worker = AnsweringThreads(
            self.versions,
            self.router,
            self.recorder,
            settings,
            partial(give_up, store),
            {each.base: its_prompts for each, its_prompts in served},
            holder,
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

    @property
    def here(self) -> dict[str, Any]:
        """What `Acting` has of this server, which keeps the settings of its start, whoever acts."""
        acting = {"store": self.store, "load": self.own_project, "region": self.settings.region, "serving": self}
        return acting if self.project is None else acting | {"unchanged": self.project.unchanged}

    def own_project(self) -> Project:
        """The project. Raises NotThere where the server has none."""
        if self.project is None:
            raise NotThere("this server has no project", code="no_project")
        return self.project

    def arrives(self, user: User) -> AbstractContextManager[Callable[[int], None]]:
        """Count a request of the user while its body is read (`Arriving.one`)."""
        return self.arriving.one(user.name, self.worker.held_by(user.name))

    async def perform(self, acting: Acting, action: Action[Any, Any], asked: Any) -> Any:
        """What an action returns."""
        threads = self.files if action.reads_files else self.noting
        done = await threads.run(acting.actor, partial(action, acting, asked))
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
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


Body = TypeVar("Body", bound=BaseModel)
Dependency = TypeVar("Dependency", bound=Callable[..., Any])


def decides(decision: str) -> Callable[[Dependency], Dependency]:
    """Mark a dependency that decides who may call the routes that take it. decision: its name, such as `session`."""

    def mark(dependency: Dependency) -> Dependency:
        dependency.decision = decision  # type: ignore[attr-defined]
        return dependency

    return mark


def needs(*scopes: TokenScope) -> Any:
    """A dependency: a valid token with one of these scopes; without scopes, any valid token.

    Raises ApiError 404 or 400 for an address that nothing has, 401 without a valid token, 429 where the token or its
    tenant sends too many requests, 403 where the token lacks the scope or the user may not use models.
    """

    @decides(" or ".join(scopes) or "any token")
    async def decide(request: Request) -> None:
        if "\0" in request.scope["path"]:  # no database stores it as text
            raise ApiError(404, "There is nothing at this address.", "not_found")
        if b"%00" in request.scope["query_string"]:
            raise bad_request("The address holds a NUL character.")
        serving = serving_of(request)
        who = await who_has(request)
        serving.used[who.digest] = time.time()
        serving.rates.take(request.scope, who.digest, who.user.tenant)
        request.state.caller = who
        if scopes and not who.token.permits(*scopes):
            raise forbidden(f"{capital(who.token.lacks(*scopes))}.", "insufficient_scope")

    return Depends(decide)


async def who_has(request: Request) -> Caller:
    """Who has the request's token now. Raises ApiError 401 without a valid one, 403 where they may not use models."""
    token, router = bearer(request), serving_of(request).router
    known = router.known_caller(token)
    return await asyncio.to_thread(router.caller, token) if known is None else known


class PlainRoute(APIRoute):
    """A route whose endpoint and dependencies take the request and nothing else.

    FastAPI's own handler sorts out parameters, bodies and answers for each request, which takes as long as all else
    that it does.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request: the dependencies in turn, then the endpoint."""
        decide = [each.call for each in self.dependant.dependencies]
        answer = self.endpoint

        async def handle(request: Request) -> Response:
            for each in decide:
                assert each is not None
                await each(request)
            response: Response = await answer(request)
            return response

        return handle


@dataclass(frozen=True, kw_only=True)
class Call(Acting):
    """Who calls, and the server."""

    token: Token = field()  # always there
    serving: Serving

    @classmethod
    def by(cls, who: Caller, serving: Serving) -> Call:
        """The call of somebody."""
        return cls(**serving.here, user=who.user, token=who.token)


async def call_of(request: Request) -> Call:
    """Who calls, on a route that declares `needs`."""
    return Call.by(request.state.caller, serving_of(request))


Calling = Annotated[Call, Depends(call_of)]


async def read(request: Request, call: Call, model: type[Body], in_path: Fields | None = None) -> Body:
    """A request's body. in_path: fields of the model that the path holds."""
    with call.serving.arrives(call.user) as count:
        return await read_body(request, model, call.serving.settings, count, in_path=in_path)


def taking(
    look: Callable[..., Any], answer: Callable[[Any, Callable[[], Any]], Awaitable[Response]]
) -> Callable[..., Coroutine[Any, Any, Response]]:
    """An endpoint that takes what a function takes. answer: given its first argument and the call that is to be made.

    Where that is made in a thread, the function needs no `await`, and may read the database.
    """
    signature = inspect.signature(look, eval_str=True)
    first = next(iter(signature.parameters))

    async def endpoint(**given: Any) -> Response:
        return await answer(given[first], partial(look, **given))

    endpoint.__name__, endpoint.__doc__ = look.__name__, look.__doc__
    endpoint.__signature__ = signature  # type: ignore[attr-defined]
    return endpoint


@decides("public")
async def _anybody() -> None:
    return


PUBLIC: Any = Depends(_anybody)


def document(result: BaseModel | Response) -> Response:
    """A result as the answer, which no cache keeps."""
    if isinstance(result, Response):
        return result
    return JSONResponse(result.model_dump(mode="json", by_alias=True), headers={"cache-control": "no-store"})


async def _on_lists(call: Call, look: Callable[[], BaseModel | Response]) -> Response:
    return document(await call.serving.listing.run(call.actor, look))


def in_turn(look: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Response]]:
    """An endpoint of a function of a `Call`: a thread of those for lists runs it, and what it returns is the answer."""
    return taking(look, _on_lists)


def bearer(request: Request) -> str:
    """The request's bearer token. Raises ApiError 401 without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise unauthorised()
    return token.strip()
