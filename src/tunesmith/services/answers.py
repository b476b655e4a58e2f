"""Answers of candidates: to an evaluation's held-out requests, one by one, and to what people ask directly.

Requests and answers of an evaluation are texts of rows: they take the permission `evidence.read` and an evaluation that
the user may see. What candidates answer when they are asked directly is no evidence: it is not measured, recorded or
kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache

from sqlalchemy import select

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.access import Caller
from tunesmith.core.digests import is_digest
from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress, Stopped
from tunesmith.core.text.display import Change, differences
from tunesmith.core.text.names import Scope
from tunesmith.core.values import View
from tunesmith.engines.protocol import Completion, Streamed
from tunesmith.evaluation.report.approach_ladder import CONTROL, approach_of
from tunesmith.evaluation.report.matrix import CHANGES, Filter, Matrix, Reader, Selected, Sight
from tunesmith.evaluation.report.matrix import Change as RowChange
from tunesmith.evaluation.summary import EvaluationSummary, rival_of, verdict_summary
from tunesmith.pipeline.candidates import answerer, candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.serving import may_load
from tunesmith.registry.versions import Version, load_version, resolve
from tunesmith.services.actions import Acting
from tunesmith.services.evaluations import READ_PERMISSION, refused_if_inconsistent, show_evaluation, when_made
from tunesmith.store.database import covering
from tunesmith.store.records import recalled, recalls_of
from tunesmith.store.store import Store
from tunesmith.store.tables import EdgeRow, VersionRow

REFERENCE = "reference"  # what an answer may be compared with, beside candidates
FILTERS = Filter._fields  # of the requests of an evaluation
_SHOWN_REQUEST, _SHOWN_ANSWER = 120, 60  # characters of a text in the matrix


class MatrixCell(View):
    """One answer in the matrix. valid: None where no metric measures the form; cut: it reached the longest length.

    text: its beginning; None where the reader may not see what it was made with.
    """

    score: float
    valid: bool | None
    cut: bool
    text: str | None


class MatrixRow(View):
    """One request. place: from 0, among the chosen ones. cells: in the order of the matrix's candidates."""

    place: int
    id: str
    group: str
    request: str
    change: RowChange
    cells: tuple[MatrixCell, ...]


class RequestMatrix(View):
    """A piece of the matrix of requests by candidates, in the order shown: losses and wins first.

    candidates: the two compared first. total: requests that the reader may see; chosen: those that the filter keeps;
    changes: of all, loss, win, differs or same -> requests; rows: those asked for. labels: the most frequent labels
    with their rows. measures_form: whether a metric says that answers are invalid.
    """

    evaluation: str
    dataset: str
    candidates: tuple[str, ...]
    metrics: tuple[str, ...]
    filter: dict[str, str]
    total: int
    chosen: int
    changes: dict[RowChange, int]
    labels: tuple[tuple[str, int], ...]
    measures_form: bool
    rows: tuple[MatrixRow, ...]


class FoundText(View):
    """A passage or training example that an answer was made with. title: the headings above a passage, or empty."""

    source: str
    title: str
    text: str


class OpenedAnswer(View):
    """One candidate's answer. changes: from what it is compared with to this answer, word by word.

    text, changes, retrieved: None, empty where the reader may not see something that the answer was made with.
    """

    candidate: str
    text: str | None
    scores: dict[str, float]
    valid: bool | None
    cut: bool
    prompt_tokens: int
    completion_tokens: int
    changes: tuple[Change, ...]
    retrieved: tuple[FoundText, ...]


class OpenedRequest(View):
    """A held-out request with all answers. turns: (role, text) before the answer; reference: the right answer.

    candidates, answers: the two compared first. compared: what the answers' changes start from, REFERENCE or a
    candidate. place: from 0 among the chosen requests, None if the filter leaves it out; previous, next: ids of its
    neighbours there.
    """

    evaluation: str
    id: str
    source: str
    group: str
    labels: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    reference: str
    candidates: tuple[str, ...]
    primary: str
    compared: str
    answers: tuple[OpenedAnswer, ...]
    place: int | None
    chosen: int
    previous: str | None
    next: str | None


@refused_if_inconsistent()
def show_requests(
    acting: Acting, digest: str, chosen: Mapping[str, str], first: int = 0, most: int = 0
) -> RequestMatrix:
    """A piece of the matrix.

    chosen: fields of Filter; what is left out is chosen as the report
    chooses it. Raises Forbidden without the permission, NotThere where the user sees no such evaluation, Refused for a
    recalled one and for evidence that is not consistent, UsageError for a candidate or metric that was not measured.
    """
    matrix, reader = _readable(acting, digest), Reader(acting.user.scope, acting.caller)
    use = _filter(acting, digest, matrix, chosen)
    selected, sight = matrix.select(use, reader), matrix.sight(reader)
    changes = matrix.changes(use.focus, use.rival, use.metric)
    names = _names(use, matrix)
    return RequestMatrix.of(
        matrix,
        evaluation=digest,
        candidates=names,
        filter={key: getattr(use, key) for key in FILTERS},
        total=len(sight.rows),
        chosen=len(selected.places),
        changes=dict(selected.counts),
        labels=tuple(sight.labels),
        rows=tuple(
            MatrixRow.of(
                matrix.rows[place],
                place=first + number,
                request=matrix.rows[place].request[-1].text[:_SHOWN_REQUEST],
                change=CHANGES[changes[place]],
                cells=tuple(_cell(matrix, sight, name, use.metric, place) for name in names),
            )
            for number, place in enumerate(selected.places[first : first + most].tolist())
        ),
    )


@refused_if_inconsistent()
def show_request(
    acting: Acting, digest: str, row: str, chosen: Mapping[str, str], compared: str = REFERENCE
) -> OpenedRequest:
    """One request with its answers.

    compared: what the answers are compared with word by word, REFERENCE or a candidate. Raises as `show_requests` does,
    and NotThere for a row that the user may not see.
    """
    matrix, reader = _readable(acting, digest), Reader(acting.user.scope, acting.caller)
    place = matrix.place.get(row)
    if place is None or place not in matrix.sight(reader).rows:
        raise NotThere("there is no such request", fix=NextStep("list those of the newest evaluation", "requests"))
    sight, example = matrix.sight(reader), matrix.rows[place]
    use = _filter(acting, digest, matrix, chosen)
    if compared not in (REFERENCE, *matrix.candidates):
        raise UsageError(f"there is no candidate {compared[:80]!r} to compare with", fix="name one of the evaluation")
    start = example.answer if compared == REFERENCE else _text(matrix, sight, compared, place)
    selected, names = matrix.select(use, reader), _names(use, matrix)
    at, before, after = _neighbours(matrix, selected, place)
    return OpenedRequest.of(
        example,
        evaluation=digest,
        labels=tuple(matrix.labels_of(place)),
        turns=tuple((turn.role, turn.text) for turn in example.request),
        reference=example.answer,
        candidates=names,
        primary=matrix.primary,
        compared=compared,
        answers=tuple(_opened(matrix, sight, name, place, start) for name in names),
        place=at,
        chosen=len(selected.places),
        previous=before,
        next=after,
    )


# Reading


@lru_cache(maxsize=4)
def _matrix(store: Store, digest: str) -> Matrix:
    return Matrix(store, digest)


def _readable(acting: Acting, digest: str) -> Matrix:
    """The matrix, where the user may read its texts. Raises as `show_requests` says."""
    acting.user.require(READ_PERMISSION)
    with acting.store.reading() as session:
        if when_made(session, acting.user.scope, digest) is None:
            raise NotThere("there is no such evaluation", fix=NextStep("list the evaluations", "evaluations"))
        reason = recalls_of(session, [digest]).get(digest)
    if reason is not None:
        raise Refused(f"this evaluation was recalled, so its texts are not shown: {reason}", fix="evaluate again")
    return _matrix(acting.store, digest)


def _filter(acting: Acting, digest: str, matrix: Matrix, chosen: Mapping[str, str]) -> Filter:
    """The filter. Candidates that are not named: the one that the leading verdict judges, and the report's rival of it.

    Without a verdict, the best tuned candidate that is not a control.
    """
    focus, rival = chosen.get("focus"), chosen.get("rival")
    if not (focus and rival):
        page = show_evaluation(acting, digest)
        focus = focus or (page.verdict.candidate if page.verdict else _best(acting.store, matrix, page.summary))
        judged = [one.digest for one in page.verdicts if one.candidate == focus]
        verdict = verdict_summary(acting.store, judged[-1]) if judged else None
        others = [name for name in sorted(matrix.candidates) if name != focus] or [focus]
        rival = rival or rival_of(page.summary, verdict, focus)[0] or max(others, key=page.summary.mean)
    given = {key: chosen[key] for key in ("show", "group", "label", "search") if chosen.get(key)}
    return Filter(focus, rival, chosen.get("metric") or matrix.primary, **given)  # type: ignore[arg-type]


def _names(use: Filter, matrix: Matrix) -> tuple[str, ...]:
    return tuple(dict.fromkeys((use.focus, use.rival, *matrix.candidates)))


def _best(store: Store, matrix: Matrix, measured: EvaluationSummary) -> str:
    def rank(name: str) -> tuple[bool, bool, float]:
        candidate = matrix.candidates[name]
        return approach_of(store, candidate) != CONTROL, candidate.tuned, measured.mean(name)

    return max(sorted(matrix.candidates), key=rank)


def _text(matrix: Matrix, sight: Sight, name: str, place: int) -> str | None:
    return None if place in sight.withheld[name] else str(matrix.lines[name][place]["text"])


def _cell(matrix: Matrix, sight: Sight, name: str, metric: str, place: int) -> MatrixCell:
    text = _text(matrix, sight, name, place)
    return MatrixCell(
        score=float(matrix.scores[name, metric][place]),
        valid=matrix.valid(name, place),
        cut=matrix.cut(name, place),
        text=None if text is None else text[:_SHOWN_ANSWER],
    )


def _opened(matrix: Matrix, sight: Sight, name: str, place: int, start: str | None) -> OpenedAnswer:
    line, text = matrix.lines[name][place], _text(matrix, sight, name, place)
    retrieved = [matrix.retrieved[name][identifier] for identifier in line.get("retrieved", ()) if text is not None]
    return OpenedAnswer(
        candidate=name,
        text=text,
        scores={metric: float(matrix.scores[name, metric][place]) for metric in matrix.metrics},
        valid=matrix.valid(name, place),
        cut=matrix.cut(name, place),
        prompt_tokens=line.get("prompt_tokens", 0),
        completion_tokens=line.get("completion_tokens", 0),
        changes=() if start is None or text is None else tuple(differences(start, text)),
        retrieved=tuple(FoundText.of(one) for one in retrieved),
    )


def _neighbours(matrix: Matrix, selected: Selected, place: int) -> tuple[int | None, str | None, str | None]:
    """A row's place among the chosen ones, and the ids before and after it."""
    at = next(iter((selected.places == place).nonzero()[0].tolist()), None)
    if at is None:
        return None, None, None
    ids = [matrix.rows[each].id for each in selected.places[max(0, at - 1) : at + 2].tolist()]
    return at, ids[0] if at else None, ids[-1] if at + 1 < len(selected.places) else None


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
    context = PipelineContext(project.in_this_process(), progress) if training.of().ray else training
    if who in project.settings.candidates:
        yield answerer(context, load_candidate(project.store, candidate(training, who)))
        return
    if "@" not in who and not is_digest("sha256:" + who.removeprefix("sha256:").ljust(64, "0")):
        context.settings_of(who)  # raises an error that lists the candidates
    with verified_copy(project.store, resolve(project.store, who)) as loaded:
        engine = context.on(loaded.candidate.base).engine if loaded.candidate.asks_base else None
        if engine is not None and loaded.adapter is not None and loaded.candidate.training is not None:
            engine.load_adapter(loaded.candidate.training, loaded.adapter)
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
    last: Streamed | Completion | None = None
    for piece in to.responder.stream(to.generation(turn, who, max_tokens=max_tokens), to.candidate.training):
        last = piece
        if stopped():
            raise Stopped("the question was stopped")
    assert isinstance(last, Completion)  # the last item of a stream
    sources = tuple(to.composer.retrieved(turn, who).sources)
    return ChatAnswer(answer=last.text, finish=last.finish, candidate=to.candidate.name, sources=sources)


def choices(acting: Acting, bases: Collection[str], evaluation: str) -> tuple[Choice, ...]:
    """The candidates of an evaluation. bases: the server's. Expects that the user may see the evaluation."""
    measured = EvaluationBody.read(acting.store, evaluation).candidates
    return tuple(_choice(acting, bases, name, one.candidate) for name, one in measured.items())


def _choice(acting: Acting, bases: Collection[str], name: str, digest: str) -> Choice:
    store, candidate = acting.store, load_candidate(acting.store, digest)
    version, why = None, _why_not(candidate, bases)
    if why is None:
        version, why = _loadable(store, acting.caller.scope, digest)
    if version is None and why is None:
        if not acting.user.scope.unlimited:
            why = "no version of it is registered for you: it may answer with rows of other tenants"
        else:
            why = "its weights are not registered as a version" if candidate.tuned else _recalled(store, digest)
    return Choice(name=name, digest=digest, version=version, refused=why)


def _why_not(candidate: Candidate, bases: Collection[str]) -> str | None:
    if candidate.endpoint is not None:
        return "it is an endpoint of somebody else, which only evaluations ask"
    if candidate.asks_base and candidate.base not in bases:
        return "it was made for another base model than this server runs"
    return None


def _recalled(store: Store, digest: str) -> str | None:
    with store.reading() as session:
        reason = recalled(session, digest)
    return None if reason is None else f"it was recalled: {reason}"


def _loadable(store: Store, scope: Scope, candidate: str) -> tuple[Version | None, str | None]:
    """The newest version of a candidate that a scope may load; without one, why the newest of the scope may not."""
    query = select(VersionRow.digest).join(EdgeRow, EdgeRow.child == VersionRow.digest)
    query = query.where(EdgeRow.parent == candidate, EdgeRow.role == "candidate")
    query = query.where(*covering(VersionRow, scope))
    first = None
    with store.reading() as session:
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
