"""Has a candidate's prompt rewritten by another model, with GEPA (Agrawal et al. 2025), within a search's bounds.

GEPA keeps nothing itself: the answers that the search keeps, the rewriter's among them, lead it the same way after a
kill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.candidates.endpoint import Endpoint
from tunesmith.candidates.optimise import Asker, Tried
from tunesmith.candidates.settings import EndpointSettings
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.data.dataset import Example
from tunesmith.engines.protocol import Generation

_PROMPT = "prompt"  # GEPA's name for the text that is rewritten
_LONGEST = 2048  # tokens of the rewriter's answer


class Rewriter:
    """What GEPA calls: scores of a prompt, what went wrong with it, and another model that rewrites it.

    Raises UsageError where the package gepa or the model's key is missing.
    """

    propose_new_texts = None  # GEPA's own way to ask the rewriter

    def __init__(self, asker: Asker, settings: EndpointSettings, where: str) -> None:
        try:
            import gepa
        except ImportError as error:
            raise UsageError("a rewriter needs gepa", where=where, fix="pip install 'tunesmith[gepa]'") from error
        self._gepa, self._asker, self._settings, self._endpoint = gepa, asker, settings, Endpoint(settings)
        self._failed: Exception | None = None

    def rewrite(self, from_: Tried, rows: Sequence[Example]) -> None:
        """Try prompts that the rewriter writes, in the place of a candidate's own. Raises Spent, and TunesmithError
        where the rewriter or the candidate's endpoint fails."""
        self._from = from_
        self._gepa.optimize(
            seed_candidate={_PROMPT: from_.candidate.prompt},
            trainset=list(rows),
            valset=list(rows),
            adapter=self,
            reflection_lm=self._written,
            max_metric_calls=self._asker.limit - self._asker.calls + len(rows),  # the first answers are known
            stop_callbacks=lambda _state: self._failed is not None,
            logger=self,
            seed=self._asker.settings.seed,
        )
        if self._failed is not None:
            raise self._failed

    def log(self, message: str) -> None:
        """GEPA's own log, which nobody reads."""

    def evaluate(self, batch: Sequence[Example], candidate: Mapping[str, str], capture_traces: bool = False) -> Any:
        """GEPA's scores of a prompt's answers. A prompt that cannot be answered with, such as one that is too long,
        scores 0."""
        made = self._from.candidate.model_copy(update={"prompt": candidate[_PROMPT]})
        try:
            lines = self._asker.answers(batch, made, self._from.shots, self._from.how)
        except UsageError as error:
            lines = [{"score": 0.0, "text": error.what}] * len(batch)
        scores = [line["score"] for line in lines]
        return self._gepa.EvaluationBatch(lines, scores, list(zip(batch, lines, strict=True)))

    def make_reflective_dataset(self, candidate: Any, scored: Any, components: Any) -> dict[str, list[dict[str, str]]]:
        """What the rewriter is shown: requests, answers, and what was expected."""
        return {
            _PROMPT: [
                {
                    "Inputs": "\n\n".join(turn.text for turn in row.request if turn.role != "system"),
                    "Generated Outputs": line["text"],
                    "Feedback": f"Score {line['score']:g} of 1. The expected answer is: {row.answer}",
                }
                for row, line in scored.trajectories
            ]
        }

    def _written(self, asked: str) -> str:
        """The rewriter's answer. GEPA goes on after any error, so the first one is kept, and ends the rewriting."""
        try:
            if self._failed is None:
                return self._answer(asked)
        except Exception as error:
            self._failed = error
            raise
        raise self._failed

    def _answer(self, asked: str) -> str:
        self._asker.spend("rewriter", 1)
        kept = self._asker.work / f"rewriter-{digest_bytes(asked.encode()).removeprefix('sha256:')}.json"
        if not kept.is_file():
            request = Generation(messages=(Message(role="user", content=asked),), max_tokens=_LONGEST)
            (given,) = self._endpoint.generate([request])
            tokens = {"prompt_tokens": given.prompt_tokens, "completion_tokens": given.completion_tokens}
            write_atomic(kept, json.dumps({"text": given.text, **tokens}).encode())
        answer = parse_json(kept.read_bytes())
        self._asker.paid("rewriter", self._settings.price, [answer])
        return str(answer["text"])
