"""Evidence: evaluations, what one of them showed, its matrix of requests by candidates, one request, the playground.

The playground puts a question to several candidates of an evaluation, side by side. It is no evidence: nothing is
recorded. Few questions are under way at once, and one of each person, so that trying things takes little from the
traffic. A question that takes too long is stopped: a candidate that hangs keeps its thread and nobody's page.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import field as made
from functools import partial
from urllib.parse import urlencode

from fastapi import Request, Response

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Stopped
from tunesmith.server.answering.recording import LOG
from tunesmith.server.api.routing import Page
from tunesmith.server.console.rendering import pages, private
from tunesmith.server.console.routing import Changing, Looking, Pages, Viewer, field, form
from tunesmith.server.errors import ApiError, bad_request
from tunesmith.services import answers, evaluations
from tunesmith.services.answers import Choice
from tunesmith.services.evaluations import READ_PERMISSION, EvaluationPage, report_sections

routes = Pages()
_AT = "/console/evidence"
_ROWS = 50  # requests on a page of the matrix
SHOWN = {
    "all": "all requests",
    "flips": "wins and losses",
    "losses": "losses",
    "wins": "wins",
    "invalid": "answer not valid",
    "long": "long, or cut off",
}
_MOST_TOKENS = 256  # of one answer in the playground
_MOST_CHARACTERS = 4000  # of a question
_MOST_CANDIDATES = 6  # that one question is put to
_MOST_SECONDS = 120.0  # for all answers to one question, with its wait for a place
CHANGES = {"loss": "loss", "win": "win", "differs": "others differ", "same": "all alike"}


@routes.shows(_AT)
def listed(viewer: Looking, page: Page = 1) -> Response:
    """The evaluations that this person may see, newest first."""
    return viewer.page("evidence.html.jinja", listed=evaluations.list_evaluations(viewer, page))


@routes.shows(_AT + "/{digest}")
def one(viewer: Looking, digest: str, verdict: str = "") -> Response:
    """One evaluation. What it showed is fetched by the page: computing it for the first time takes seconds."""
    return viewer.page("evidence_evaluation.html.jinja", evaluation=shown(viewer, digest, verdict), digest=digest)


@routes.shows(_AT + "/{digest}/findings")
def findings(viewer: Looking, digest: str, verdict: str = "") -> Response:
    """The sections of the report, without requests and answers. Computing them takes seconds."""
    judged = verdict and _full(verdict)
    report = evaluations.show_findings(viewer, _full(digest), judged)
    chosen = urlencode({"focus": report.focus, "rival": report.rival or ""})
    return private(report_sections(report, f"{_AT}/{digest}/requests?{chosen}"))


@routes.shows(_AT + "/{digest}/requests")
def requests(viewer: Looking, request: Request, digest: str, page: Page = 1) -> Response:
    """The page of the matrix. What it shows is fetched by it: reading many rows for the first time takes seconds."""
    viewer.user.require(READ_PERMISSION)
    query = urlencode({**_chosen(request), "page": page})
    return viewer.page("evidence_requests.html.jinja", evaluation=shown(viewer, digest), digest=digest, query=query)


@routes.shows(_AT + "/{digest}/matrix")
def matrix(viewer: Looking, request: Request, digest: str, page: Page = 1) -> Response:
    """The filters, and a page of the requests with every candidate's answer."""
    first = (page - 1) * _ROWS
    shown = answers.show_requests(viewer, _full(digest), _chosen(request), first, _ROWS)
    query = urlencode({key: value for key, value in shown.filter.items() if value})
    response = viewer.page(
        "evidence_matrix.html.jinja",
        matrix=shown,
        digest=digest,
        query=query,
        shown=SHOWN,
        changes=CHANGES,
        page=page,
        pages=pages(shown.chosen, _ROWS),
    )
    response.headers["HX-Replace-Url"] = f"{_AT}/{digest}/requests?{query}&page={page}"
    return response


@routes.shows(_AT + "/{digest}/requests/{row}")
def opened(viewer: Looking, request: Request, digest: str, row: str, compared: str = answers.REFERENCE) -> Response:
    """One request: answers side by side, their differences, and what was retrieved."""
    chosen = _chosen(request)
    one = answers.show_request(viewer, _full(digest), row, chosen, compared)
    query, page = urlencode(chosen), (one.place or 0) // _ROWS + 1
    return viewer.page("evidence_request.html.jinja", opened=one, digest=digest, query=query, chosen=chosen, page=page)


def lost(viewer: Viewer, version: str, before: str = "") -> dict[str, str] | None:
    """The address of the requests that a version lost, what it says, and the address of its evaluation.

    version, before: digests. None where this person may not read them.
    """
    if not viewer.user.may(READ_PERMISSION):
        return None
    pair = evaluations.compare_versions(viewer, version, before)
    if pair is None or not pair.rival:
        return None
    chosen = urlencode({"focus": pair.focus, "rival": pair.rival, "show": "losses"})
    here = f"{_AT}/{pair.evaluation[7:]}"
    return {
        "requests": f"{here}/requests?{chosen}",
        "against": f"{pair.against} ({pair.rival})" if pair.against else pair.rival,
        "evaluation": f"{here}?verdict={pair.verdict[7:]}",
    }


def shown(viewer: Viewer, digest: str, verdict: str = "") -> EvaluationPage:
    """The evaluation of an address. Raises NotThere where this person sees none."""
    judged = verdict and _full(verdict)
    return evaluations.show_evaluation(viewer, _full(digest), judged)


def _chosen(request: Request) -> dict[str, str]:
    return {key: value for key in answers.FILTERS if (value := request.query_params.get(key, ""))}


def _full(hexadecimal: str) -> str:
    return f"sha256:{hexadecimal}"


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate's answer, or why there is none. cut: it reached the most tokens."""

    name: str
    answer: str = ""
    cut: bool = False
    sources: Sequence[str] = ()
    problem: str = ""


@dataclass(slots=True)
class Trial:
    """One question on its way. answers: by candidate, as they come. begun: it had its turn."""

    begun: bool = False
    stopped: threading.Event = made(default_factory=threading.Event)
    answers: dict[str, Tried] = made(default_factory=dict)


@routes.shows(_AT + "/{digest}/playground")
def asked(viewer: Looking, digest: str) -> Response:
    """The form: which candidates this server can answer for, and why not for the others."""
    bounds = {
        "tokens": _MOST_TOKENS,
        "characters": _MOST_CHARACTERS,
        "candidates": _MOST_CANDIDATES,
        "seconds": min(_MOST_SECONDS, viewer.serving.settings.answer_seconds),
    }
    return viewer.page("evidence_playground.html.jinja", digest=digest, choices=_choices(viewer, digest), bounds=bounds)


@routes.post(_AT + "/{digest}/playground")
async def answered(request: Request, viewer: Changing, digest: str) -> Response:
    """The answers of the chosen candidates to one question, one after the other."""
    fields = await form(request)
    question, names = field(fields, "question"), fields.get("candidate", [])
    choices = await viewer.run(partial(_choices, viewer, digest))
    chosen = [one for one in choices if one.name in names and one.refused is None]
    if not question:
        raise bad_request("Write a question first.")
    if len(question) > _MOST_CHARACTERS:
        raise bad_request(f"The question has {len(question)} characters; the most are {_MOST_CHARACTERS}.")
    if not 1 <= len(chosen) <= _MOST_CANDIDATES:
        raise bad_request(f"Choose one to {_MOST_CANDIDATES} of the candidates that can answer here.")
    trial, limit = Trial(), min(_MOST_SECONDS, viewer.serving.settings.answer_seconds)
    try:
        async with asyncio.timeout(limit):
            await viewer.serving.trying.run(viewer.actor, partial(_ask_all, viewer, chosen, question, trial))
    except TimeoutError:
        trial.stopped.set()
    if not trial.begun:
        what = f"Other questions took all places for {limit:g} s. Ask again, or ask an operator if the engine hangs."
        raise ApiError(503, what)
    late = f"no answer within {limit:g} s: the question was stopped"
    tried = [trial.answers.get(one.name) or Tried(one.name, problem=late) for one in chosen]
    return viewer.page("evidence_tried.html.jinja", question=question, tried=tried)


def _choices(viewer: Viewer, digest: str) -> tuple[Choice, ...]:
    viewer.user.require(READ_PERMISSION)
    evaluation = shown(viewer, digest).summary.evaluation
    return answers.choices(viewer, viewer.serving.versions.bases, evaluation)


def _ask_all(viewer: Viewer, chosen: Sequence[Choice], question: str, trial: Trial) -> None:
    trial.begun = True
    for one in chosen:
        if not trial.stopped.is_set():
            trial.answers[one.name] = _ask(viewer, one, question, trial.stopped.is_set)


def _ask(viewer: Viewer, choice: Choice, question: str, stopped: Callable[[], bool]) -> Tried:
    """One candidate's answer. An error is that candidate's alone."""
    versions = viewer.serving.versions
    try:
        if choice.version is not None:
            answerer = versions.answerer(choice.version)
        else:
            answerer = versions.without_weights(choice.digest)
        answer = answers.ask(answerer, question, caller=viewer.caller, max_tokens=_MOST_TOKENS, stopped=stopped)
    except Stopped as error:
        return Tried(choice.name, problem=str(error))
    except TunesmithError as error:
        return Tried(choice.name, problem=error.what)
    except Exception:  # noqa: BLE001 - the engine failed on this question alone
        LOG.exception("the engine failed on a question of the playground")
        return Tried(choice.name, problem="the engine failed on this question; the server's log says why")
    return Tried(choice.name, answer.answer, answer.finish == "length", answer.sources)
