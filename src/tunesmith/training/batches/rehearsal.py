"""Rehearsal: general requests with the base's own answers among the training rows, so that a training forgets less.

Method: pseudo-rehearsal (Robins 1995, "Catastrophic Forgetting, Rehearsal and Pseudorehearsal"); for language models
Huang et al. 2024, "Mitigating Catastrophic Forgetting in Large Language Models with Self-Synthesized Rehearsal".
Answers are drawn from the base at temperature 1: the loss over them is least for a model that answers as the base does.
Each epoch has new ones while there are any, since a few that come again and again are learned by heart. The requests
are packaged; no probe asks one of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from typing import NamedTuple, cast

from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Progress
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.system.files import write_atomic
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.engines.ranks import Ranks
from tunesmith.engines.training_protocol import LoadedModel, ShardedModel
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.batches.batch_plan import rehearsed_each_epoch
from tunesmith.training.schedule import DECISIONS, read_decisions
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingSpec

_MOST = 256  # answers of a training; one that rehearses more takes them again
_LONGEST = 48  # tokens of an answer; of a longer one its beginning is learned
_TOGETHER = 32  # requests at once
_SHARE = 0.05  # of a budget: no further requests are asked after that
_UNFIT = "they are longer than max_length, or the chat template cannot render them"


class Rehearsed(NamedTuple):
    """A general request and the base's answer. ended: whether the base ended it, and not its longest length."""

    request: str
    answer: str
    ended: bool


class Rehearsal(NamedTuple):
    """What a training rehearses. rows: with the base's answers to learn. answers: how many were drawn; seconds: that it
    took in this process; digest: of the requests and answers."""

    rows: Sequence[Rendered] = ()
    answers: int = 0
    seconds: float = 0.0
    digest: str = ""

    def notices(self) -> list[str]:
        """Says how many answers are not rehearsed, where there are any."""
        if len(self.rows) == self.answers:
            return []
        return [f"{self.answers - len(self.rows)} of {self.answers} answers of the base are not rehearsed: {_UNFIT}"]


def prepare_rehearsal(
    spec: TrainingSpec,
    loaded: LoadedModel,
    rows: int,
    clock: Callable[[], float],
    ranks: Ranks,
    progress: Progress,
) -> Rehearsal:
    """What a training on so many rows rehearses. It is drawn once: a stopped training goes on with the same, a repeated
    one draws as many. Within a budget it is drawn again until the time that it took is part of the training's
    decisions. With several ranks, each of them calls this.

    Raises Refused where the base cannot answer, or none of its answers can be rehearsed.
    """
    if not spec.settings.rehearse:
        return Rehearsal()
    kept = spec.work / "rehearsal.jsonl"
    decided = ranks.agree(lambda: _decided(spec, rows))

    def before() -> str | None:
        with suppress(OSError, ValueError):  # missing, or damaged: then it is drawn again, and compared
            if decided is not None and len(decode_rehearsed(data := kept.read_bytes())) == decided:
                return data.decode()
        return None

    def answers(asked: Sequence[Generation]) -> list[Completion]:
        try:
            if ranks.size > 1:
                return cast(ShardedModel, loaded).answer_together(asked, None)
            return loaded.engine().generate(asked)
        except UsageError as error:  # a template that asks for a system turn, or too short a context
            raise Refused(
                f"the base cannot answer general requests: {error.what}",
                where="train.rehearse",
                fix="leave rehearse out, or use another base",
            ) from error

    seconds, known = 0.0, ranks.agree(before)
    data = (known or "").encode()
    if known is None:
        progress.say("rehearsal: the base answers general requests")
        began = clock()
        data = encode_rehearsed(rehearse(spec.settings, rows, answers, clock, decided))
        if ranks.first:
            write_atomic(kept, data)
        seconds = clock() - began
    drawn = decode_rehearsed(data)
    rendered = render_rehearsed(Renderer(spec.base.folder), drawn, spec.settings.max_length)
    if not rendered:
        raise Refused(
            f"none of {len(drawn)} answers of the base can be rehearsed: {_UNFIT}",
            where="train.rehearse",
            fix=f"set max_length higher than {spec.settings.max_length}, or leave rehearse out",
        )
    return Rehearsal(rendered, len(drawn), seconds, digest_bytes(data))


def _decided(spec: TrainingSpec, rows: int) -> int | None:
    """How many answers a training on so many rows draws, where no clock decides that any more."""
    before = spec.decisions
    if before is None:
        with suppress(ValueError):  # a training refuses damaged decisions itself
            before = read_decisions(spec.work / DECISIONS)
    if before is not None:
        return before.rehearsed
    return _most(spec.settings, rows) if spec.settings.budget is None else None


def _most(settings: TrainSettings, rows: int) -> int:
    """How many answers all epochs take, up to the limit."""
    return min(_MOST, rehearsed_each_epoch(settings, rows) * settings.epochs)


def rehearse(
    settings: TrainSettings,
    rows: int,
    answers: Callable[[Sequence[Generation]], Sequence[Completion]],
    clock: Callable[[], float],
    decided: int | None = None,
) -> list[Rehearsed]:
    """What a training on so many rows rehearses. The same seed, number and answers give the same.

    answers: the base's. clock: seconds, which count against a budget. decided: how many, where that was decided before.
    """
    requests = general_requests()
    random.Random(f"rehearsal {settings.seed}").shuffle(requests)
    count = _most(settings, rows) if decided is None else decided
    until = None if settings.budget is None or decided is not None else clock() + _SHARE * settings.budget
    made: list[Rehearsed] = []
    while len(made) < count and (not made or until is None or clock() < until):
        asked = [
            Generation(
                (Message(role="user", content=requests[place % len(requests)]),),
                max_tokens=_LONGEST,
                temperature=1.0,
                seed=settings.seed + place,
            )
            for place in range(len(made), min(count, len(made) + _TOGETHER))
        ]
        given = zip(asked, answers(asked), strict=True)
        made += [Rehearsed(one.messages[0].content, answer.text, answer.finish == "stop") for one, answer in given]
    return made


def encode_rehearsed(rehearsed: Sequence[Rehearsed]) -> bytes:
    """As JSON lines."""
    return "".join(f"{json.dumps(each._asdict(), ensure_ascii=False)}\n" for each in rehearsed).encode()


def decode_rehearsed(data: bytes) -> list[Rehearsed]:
    """What encode_rehearsed wrote. Raises ValueError for anything else."""
    try:
        return [Rehearsed(**parse_json(line)) for line in data.splitlines()]
    except TypeError as error:
        raise ValueError(str(error)) from error


def render_rehearsed(renderer: Renderer, rehearsed: Sequence[Rehearsed], longest: int) -> list[Rendered]:
    """Token ids with the answers' tokens to learn; of an answer that was cut off, not its end. Leaves out what the
    template cannot render, what is empty and what is longer than so many tokens."""
    rows = []
    for each in rehearsed:
        turns = (Message(role="user", content=each.request), Message(role="assistant", content=each.answer))
        try:
            row = renderer.conversation(turns, "assistant")
        except (Refused, UsageError):  # such as an answer that spells a control token, or begins with what is stripped
            continue
        if not each.ended:
            end = max(place for place, learned in enumerate(row.trained) if learned)  # the token that ends the turn
            row = Rendered(row.ids[:end], row.trained[:end])
        if any(row.trained) and len(row.ids) <= longest:
            rows.append(row)
    return rows


def general_requests() -> list[str]:
    """The packaged requests."""
    text = (resources.files("tunesmith.training.batches") / "general_requests.txt").read_text(encoding="utf-8")
    return text.splitlines()
