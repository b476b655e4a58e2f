"""Ask a candidate or a version directly, without a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.access import Caller
from tunesmith.core.digests import is_digest
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress, Stopped
from tunesmith.core.view import View
from tunesmith.engines.protocol import Completion, Streamed
from tunesmith.pipeline.candidates import answerer, candidate
from tunesmith.pipeline.context import PipelineContext
from tunesmith.project import Project
from tunesmith.registry.opening import verified_copy
from tunesmith.registry.versions import resolve


class ChatAnswer(View):
    """One answer. finish: stop, or length if it reached max_tokens; sources: the retrieved texts."""

    answer: str
    finish: str
    candidate: str
    sources: tuple[str, ...]


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
    for piece in to.responder.stream(to.generation(turn, who, max_tokens=max_tokens), to.adapter):
        found = piece
        if stopped():
            raise Stopped("the question was stopped")
    assert isinstance(found, Completion)  # the last item of a stream
    sources = tuple(to.composer.retrieved(turn, who).sources)
    return ChatAnswer(answer=found.text, finish=found.finish, candidate=to.name, sources=sources)
