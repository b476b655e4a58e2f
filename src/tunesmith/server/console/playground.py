"""The playground: the same question to several candidates of an evaluation, side by side. It is no evidence.

Nothing is recorded. Few questions are under way at once, and one of each person, so that trying things takes little
from the traffic. A question that takes too long is stopped: a candidate that hangs keeps its thread and nobody's page.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from fastapi import Request, Response

from tunesmith.core.access import Caller
from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Stopped
from tunesmith.core.scope import Scope
from tunesmith.server.answering.recording import LOG
from tunesmith.server.console.evidence import shown
from tunesmith.server.console.people.session import Changing, Looking, Viewer, form
from tunesmith.server.console.routing import router
from tunesmith.server.errors import ApiError, bad_request
from tunesmith.services import chat
from tunesmith.services.chat import Choice
from tunesmith.services.evaluations import READ_PERMISSION

routes = router()
_AT: Final = "/console/evidence/{digest}/playground"
_MOST_TOKENS: Final = 256  # of one answer
_MOST_CHARACTERS: Final = 4000  # of a question
_MOST_CANDIDATES: Final = 6  # that one question is put to
_MOST_SECONDS: Final = 120.0  # for all answers to one question, with its wait for a place


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate's answer, or why there is none. cut: it reached the most tokens."""

    name: str
    answer: str
    cut: bool
    sources: Sequence[str]
    problem: str


@dataclass(slots=True)
class Trial:
    """One question on its way. answers: by candidate, as they come."""

    begun: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)
    answers: dict[str, Tried] = field(default_factory=dict)


@routes.get(_AT)
async def asked(viewer: Looking, digest: str) -> Response:
    """The form: which candidates this server can answer for, and why not for the others."""
    choices = await _choices(viewer, digest)
    bounds = {
        "tokens": _MOST_TOKENS,
        "characters": _MOST_CHARACTERS,
        "candidates": _MOST_CANDIDATES,
        "seconds": min(_MOST_SECONDS, viewer.serving.settings.answer_seconds),
    }
    return viewer.page("evidence_playground.html.jinja", digest=digest, choices=choices, bounds=bounds)


@routes.post(_AT)
async def answered(request: Request, viewer: Changing, digest: str) -> Response:
    """The answers of the chosen candidates to one question, one after the other."""
    fields = await form(request)
    question, names = fields.get("question", [""])[0].strip(), fields.get("candidate", [])
    chosen = [one for one in await _choices(viewer, digest) if one.name in names and one.refused is None]
    if not question:
        raise bad_request("Write a question first.")
    if len(question) > _MOST_CHARACTERS:
        raise bad_request(f"The question has {len(question)} characters; the most are {_MOST_CHARACTERS}.")
    if not 1 <= len(chosen) <= _MOST_CANDIDATES:
        raise bad_request(f"Choose one to {_MOST_CANDIDATES} of the candidates that can answer here.")
    trial, limit = Trial(), min(_MOST_SECONDS, viewer.serving.settings.answer_seconds)
    try:
        async with asyncio.timeout(limit):
            await viewer.serving.trying.run(viewer.user.name, partial(_ask_all, viewer, chosen, question, trial))
    except TimeoutError:
        trial.stopped.set()
    if not trial.begun:
        what = (
            f"Other questions took all places for {limit:g} s. Ask again, or ask an operator whether the engine hangs."
        )
        raise ApiError(503, what, code="playground_busy")
    late = f"no answer within {limit:g} s: the question was stopped"
    tried = [trial.answers.get(one.name) or Tried(one.name, "", False, (), late) for one in chosen]
    return viewer.page("evidence_tried.html.jinja", question=question, tried=tried)


async def _choices(viewer: Viewer, digest: str) -> tuple[Choice, ...]:
    viewer.user.require(READ_PERMISSION)
    found = await shown(viewer, digest)
    serving = viewer.serving
    region, base = serving.settings.region, serving.versions.base
    return await viewer.run(partial(chat.choices, viewer.store, viewer.user, region, base, found.summary.evaluation))


def _ask_all(viewer: Viewer, chosen: Sequence[Choice], question: str, trial: Trial) -> None:
    trial.begun = True
    for one in chosen:
        if not trial.stopped.is_set():
            trial.answers[one.name] = _ask(viewer, one, question, trial.stopped.is_set)


def _ask(viewer: Viewer, choice: Choice, question: str, stopped: Callable[[], bool]) -> Tried:
    """One candidate's answer. An error is that candidate's alone."""
    serving = viewer.serving
    caller = Caller(Scope(viewer.user.tenant, serving.settings.region), frozenset(viewer.user.groups))
    try:
        if choice.version is not None:
            answerer = serving.versions.answerer(choice.version)
        else:
            answerer = serving.versions.without_weights(choice.digest)
        found = chat.ask(answerer, question, caller=caller, max_tokens=_MOST_TOKENS, stopped=stopped)
    except Stopped as error:
        return Tried(choice.name, "", False, (), str(error))
    except TunesmithError as error:
        return Tried(choice.name, "", False, (), error.what)
    except Exception:  # noqa: BLE001 - the engine failed on this question alone
        LOG.exception("the engine failed on a question of the playground")
        return Tried(choice.name, "", False, (), "the engine failed on this question; the server's log says why")
    return Tried(choice.name, found.answer, found.finish == "length", found.sources, "")
