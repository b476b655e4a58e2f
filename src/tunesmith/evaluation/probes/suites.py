"""The suites of all probes: what is asked, under which weights, and how an answer becomes a number.

To add a probe, add a line to SUITES here, to JUDGES in judging.py and to PROBES in gates/settings.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.core.errors import Inconclusive
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.protocol import Engine, Generation, Question, Responder
from tunesmith.evaluation.lines import is_number
from tunesmith.evaluation.metrics.declared import Answered, Scoring, checked
from tunesmith.evaluation.probes import bias, drift_items, harness, memory, numbers
from tunesmith.evaluation.probes.context import ProbeContext
from tunesmith.evaluation.probes.items import Item
from tunesmith.models.rendering import Renderer

# An item, its answer's line and the primary metric's scoring function -> a number.
Value = Callable[[Item, Mapping[str, Any], Scoring], float]


@dataclass(frozen=True, slots=True)
class Suite:
    """How one probe is measured.

    items: makes what is asked. value: turns an answer into a number. before: whether the base's weights are asked too.
    own: whether the items come from the candidate's rows, with its prompt. untuned: whether the probe also applies to
    candidates that were not trained. none: the reason to give where there are no items. left_out: how many answers it
    leaves out because they are calls of functions. revision: raise it when the items or the number change.
    """

    items: Callable[[ProbeContext], list[Item]]
    value: Value
    before: bool = False
    own: bool = True
    untuned: bool = False
    none: str = "there are none"
    left_out: Callable[[ProbeContext], int] | None = None
    revision: int = 1

    def count_left_out(self, context: ProbeContext) -> int | None:
        """How many answers the probe leaves out; None for none."""
        return (self.left_out(context) or None) if self.left_out else None


def ask(
    responder: Responder,
    engine: Engine | None,
    renderer: Renderer,
    adapter: str | None,
    items: Sequence[Item],
    candidate: Candidate,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """A line for each item: {"id", "scores", "tokens"} by the engine, or {"id", "text"} by the candidate's responder.

    engine: None for a candidate that the base does not answer; no probe measures probabilities of such a candidate.
    """
    likely = [item for item in items if item.choices]
    written = [item for item in items if not item.choices]
    lines: list[dict[str, Any]] = []
    if likely:
        assert engine is not None
        questions = [Question(item.messages, item.choices) for item in likely]
        distinct = list(dict.fromkeys(questions))  # two items may differ in what is made of the scores alone
        scores = dict(zip(distinct, engine.choose(distinct, adapter, progress), strict=True))
        for item, question in zip(likely, questions, strict=True):
            lines.append({"id": item.id, "scores": scores[question], "tokens": _tokens(renderer, item)})
    held = Constraint(candidate)
    requests = [
        held.hold(Generation(item.messages, candidate.max_tokens), item.messages[-item.turns :]) for item in written
    ]
    for item, each in zip(written, responder.generate(requests, adapter, progress), strict=True):
        lines.append({"id": item.id, "text": renderer.comparable(item.messages, item.call, each.text)})
    return lines


def _tokens(renderer: Renderer, item: Item) -> int:
    from tunesmith.core.messages import Message

    whole = (*item.messages, Message(role="assistant", content=item.choices[0]))
    return renderer.count_row(whole) - renderer.count_prompt(item.messages)


def _likelihoods(item: Item, line: Mapping[str, Any]) -> list[float]:
    return numbers.log_probabilities(line.get("scores"), len(item.choices), item.id)


def _log_probability(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    return _likelihoods(item, line)[0]


def _probability(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    per_token = item.arm.endswith(bias.PER_TOKEN)
    return min(1.0, math.exp(-_loss(item, line, scoring) if per_token else _likelihoods(item, line)[0]))


def _share(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    return numbers.shares(_likelihoods(item, line))[0]


def _share_by_word(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    """The first choice's share, each choice weighted by its mean log-probability per word.

    Whole sentences' probabilities would give nearly all weight to one choice and hide a small drift. Without the mean
    per word, learning short answers would lower a longer choice whatever happens to its format.
    """
    scores = [value / len(choice.split()) for value, choice in zip(_likelihoods(item, line), item.choices, strict=True)]
    return numbers.shares(scores)[0]


def _likeliest(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    scores = _likelihoods(item, line)
    return float(scores[0] == max(scores))


def _pull(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    first, second = numbers.shares(_likelihoods(item, line))[:2]
    return first - second


def _loss(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    tokens = line.get("tokens")
    if not is_number(tokens) or tokens < 1:
        raise Inconclusive(f"tokens is {tokens!r}, not a count", where=item.id)
    return -_likelihoods(item, line)[0] / float(tokens)


def _log_probability_per_token(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    return -_loss(item, line, scoring)


def _text(item: Item, line: Mapping[str, Any]) -> str:
    if not isinstance(line.get("text"), str):
        raise Inconclusive("an answer has no text", where=item.id)
    return str(line["text"])


def _verbatim(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    return float(_text(item, line).strip() == (item.expected or "").strip())


def _personal(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    return float(memory.repeats_personal_data(item, _text(item, line)))


def _scored(item: Item, line: Mapping[str, Any], scoring: Scoring) -> float:
    value = scoring(Answered(_text(item, line), item.expected or "", item.messages))
    return checked(value, "the leading metric", item.id)


SUITES: dict[str, Suite] = {
    "canaries": Suite(
        memory.canary_items, _log_probability, before=True, none="it was trained without canaries (train.canaries)"
    ),
    "membership": Suite(
        memory.membership_items, _log_probability_per_token, before=True, left_out=memory.calls, revision=2
    ),
    "extraction": Suite(memory.extraction_items, _verbatim, left_out=memory.calls, revision=2),
    "personal_data": Suite(
        memory.personal_items, _personal, none="the scan finds no personal data in the training answers", revision=4
    ),
    "overfitting": Suite(memory.overfitting_items, _scored, revision=2),
    "swap": Suite(
        bias.swap_items,
        _probability,
        before=True,
        none="no held-out row contains a known name or a gendered word",
        left_out=bias.swap_calls,
        revision=2,
    ),
    "bbq": Suite(bias.bbq_items, _pull, before=True, own=False),
    "crows_pairs": Suite(bias.crows_pairs_items, _share, before=True, own=False),
    "general_text": Suite(drift_items.general_text_items, _loss, before=True, own=False, revision=2),
    "formats": Suite(drift_items.formats_items, _share_by_word, before=True, own=False, revision=2),
    "refusal": Suite(drift_items.refusal_items, _share_by_word, before=True, own=False),
    "lm_eval": Suite(harness.lm_eval_items, _likeliest, before=True, own=False),
    "robustness": Suite(drift_items.robustness_items, _scored, untuned=True, revision=3),
}


def suite_of(name: str) -> Suite:
    """The suite of a gate's suite name, such as "swap/100"."""
    return SUITES[name.split("/", 1)[0]]
