"""How a request becomes an answer. Evaluation, serving and the canary all answer through this module."""

from __future__ import annotations

from functools import cached_property

from tunesmith.candidates.baselines import make_baseline
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import Composer
from tunesmith.candidates.endpoint import Endpoint
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.candidates.settings import EndpointSettings
from tunesmith.core.access import Caller
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Conversation
from tunesmith.core.values import Schema
from tunesmith.engines.protocol import Engine, Generation, Responder
from tunesmith.models.rendering import Renderer
from tunesmith.store.store import Store


class OtherBase(UsageError):
    """A candidate was made for another base than the engine runs."""


class NeedsGrammars(UsageError):
    """A candidate's answers are held to a grammar, which the engine cannot follow."""


class Answerer:
    """A candidate, ready to turn requests into what its responder generates from.

    engine: may be None for a candidate that the base does not answer. endpoint: how an outside model is reached.
    renderer: the base's, with which evaluations read calls of functions in its answers; a server reads them itself.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine | None,
        candidate: Candidate,
        endpoint: EndpointSettings | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        if candidate.asks_base and (engine is None or candidate.base != engine.base):
            raise OtherBase(f"candidate {candidate.name} was made for another base model than the engine runs")
        if (candidate.copied or candidate.answer_grammar) and engine is not None and not engine.follows_grammars:
            raise NeedsGrammars(
                f"candidate {candidate.name} holds its answers to a grammar, which this engine cannot follow",
                where="engine",
                fix="leave `engine:` out, or release a candidate with constrain: true and a schema",
            )
        self.candidate, self._engine, self._endpoint = candidate, engine, endpoint
        self.composer, self.renderer = Composer(store, candidate), renderer

    @cached_property
    def responder(self) -> Responder:
        """What answers. Raises UsageError for an endpoint whose settings are not given here."""
        if self.candidate.method != "model":
            return make_baseline(self.candidate.method, self.composer.examples)
        if (remote := self.candidate.endpoint) is not None:
            given = self._endpoint
            if given is None or (given.url, given.model) != (remote.url, remote.model):
                raise UsageError(
                    f"{self.candidate.name} is {remote.model} at {remote.url}, which only evaluations that name it ask",
                    fix="release another candidate: an endpoint can be measured only",
                )
            return Endpoint(given)
        assert self._engine is not None
        return self._engine

    def prepare(self, messages: Conversation, caller: Caller) -> None:
        """Build what only the first answer waits for: the baseline, or the index of examples or passages.

        A server builds it once, so evaluations call this before they time answers.
        """
        _ = self.responder
        self.composer.retrieved(messages, caller)

    @cached_property
    def _constraint(self) -> Constraint:
        return Constraint(self.candidate)

    def generation(
        self,
        messages: Conversation,
        caller: Caller,
        *,
        max_tokens: int | None = None,
        schema: Schema | None = None,
    ) -> Generation:
        """What the responder generates from, decoding greedily.

        max_tokens: may lower the candidate's own bound, not raise it.
        caller: whom it is answered for. Evaluations give `composer.asked_as`, a server the caller of the request.
        schema: JSON Schema of the request, which the answer must fit as well as the candidate's own. Raises UsageError
        where it cannot be held.
        """
        if schema is not None and not self.candidate.asks_base:
            raise UsageError(
                f"{self.candidate.name} answers without a language model, so its answers cannot be held to a format",
                where="response_format",
                fix="leave response_format out",
            )
        bound = self.candidate.max_tokens
        request = Generation(
            messages=self.composer.conversation(messages, caller),
            max_tokens=bound if max_tokens is None else min(bound, max_tokens),
        )
        return self._constraint.hold(request, messages, schema)

    def require_calls(self) -> None:
        """Raise UsageError where an answer cannot call functions: it must fit the candidate's own rule, or no model
        answers."""
        ruled = self.candidate.answer_schema is not None or self.candidate.answer_grammar is not None
        if ruled or not self.candidate.asks_base:
            why = "holds its answers to its own schema or grammar" if ruled else "answers without a language model"
            raise UsageError(
                f"{self.candidate.name} {why}, so it cannot call functions", where="tools", fix="send tool_choice: none"
            )
