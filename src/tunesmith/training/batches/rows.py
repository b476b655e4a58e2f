"""Which rows a training learns from, and how they become token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.batches.canaries import plant
from tunesmith.training.settings import TrainSettings


class TrainingRow(NamedTuple):
    """A conversation in the candidate's form, its prompt included; the last message is the answer."""

    id: str
    messages: tuple[Message, ...]


def training_rows(examples: Sequence[Example], settings: TrainSettings) -> list[Example]:
    """The examples that a training learns from: as many as `rows` allows, drawn by the seed.

    A control (`permute_answers`) has the last answers shuffled among the requests, and learns nothing else: the answers
    before them still stand behind their own requests. Canaries come last, on top of `rows`.
    """
    draw = random.Random(settings.seed)
    chosen = _drawn(examples, settings, draw)
    if settings.permute_answers:
        answers = [_weighted(example.messages[-1], 1) for example in chosen]
        draw.shuffle(answers)
        chosen = [
            example.model_copy(update={"messages": (*(_weighted(turn, 0) for turn in example.request), answer)})
            for example, answer in zip(chosen, answers, strict=True)
        ]
    return plant(chosen, settings.canaries) if settings.canaries else chosen


def learns_earlier_answers(examples: Sequence[Example], settings: TrainSettings) -> bool:
    """Whether a training on these examples would learn answers before the last one of a conversation, were it no
    control."""
    last_alone = settings.loss_on == "last"
    chosen = _drawn(examples, settings, random.Random(settings.seed))
    return any(each.earlier and not (last_alone and each.messages[-1].weight) for each in chosen)


def _drawn(examples: Sequence[Example], settings: TrainSettings, draw: random.Random) -> list[Example]:
    """As many examples as `rows` allows."""
    if settings.rows is None or settings.rows >= len(examples):
        return list(examples)
    return draw.sample(list(examples), settings.rows)


def _weighted(turn: Message, weight: Literal[0, 1]) -> Message:
    """An assistant's turn with this weight; any other turn as it is."""
    return turn.model_copy(update={"weight": weight}) if turn.role == "assistant" and turn.weight != weight else turn


def row_count(examples: int, settings: TrainSettings) -> int:
    """How many rows `training_rows` gives of so many examples."""
    chosen = min(examples, settings.rows or examples)
    return chosen + (settings.canaries.added if settings.canaries else 0)


def render_rows(
    renderer: Renderer, rows: Sequence[TrainingRow], settings: TrainSettings, context: int
) -> list[Rendered]:
    """Rows as token ids with the tokens to learn marked. context: the base's context length.

    Raises Refused or UsageError, naming the row, for one that the template cannot render or that is longer than
    `max_length` or the context.
    """
    most, limit, first = settings.max_length, "max_length", "raise it, "
    if context < most:
        most, limit, first = context, "the base's context length", ""
    rendered: list[Rendered] = []
    for row in rows:
        try:
            one = renderer.conversation(row.messages, settings.loss_on)
        except (Refused, UsageError) as error:
            raise type(error)(error.what, where=f"row {row.id}, {error.where}", fix=error.fix) from error
        if len(one.ids) > most:
            raise Refused(
                f"row {row.id} has {len(one.ids)} tokens, more than {limit} {most}",
                where="train.max_length" if first else "base",
                fix=f"{first}shorten the candidate's prompt, or show fewer examples or passages (shots, "
                "retrieve.k); data.overlong does not help, since it counts a row without them",
            )
        rendered.append(one)
    return rendered
