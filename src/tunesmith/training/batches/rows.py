"""Which rows a training learns from, and how they become token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.dataset import Example, example_id
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.training.settings import CanarySettings, TrainSettings


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
    planted = canaries(chosen, settings.canaries) if settings.canaries else []
    return chosen + [
        each.example.model_copy(update={"id": f"{each.example.id}-{turn}"})  # every copy with its own id
        for each in planted
        for turn in range(each.repeats)
    ]


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


SOURCE = "canary"


class Canary(NamedTuple):
    """repeats: how many times it is added to the rows; 0 for a control."""

    example: Example
    repeats: int


def canaries(examples: Sequence[Example], settings: CanarySettings) -> list[Canary]:
    """All canaries for training rows, controls included. The same rows and settings give the same canaries.

    Canaries are rows with a random secret, added to the training rows to measure what a model memorises. Method:
    Carlini et al. 2019, "The Secret Sharer" (USENIX Security). All secrets have the same format. Some are added to the
    rows, each a given number of times; others, the controls, are never added. A canary's exposure says how unlikely its
    high rank among the controls is. Controls are chosen at random, so they differ from the others only in not being
    added.

    A canary has the form of the user's rows: the request and the answer of one of them, with a reference of six digits
    before the request, and the secret, eight digits, in the answer (as the last text of a JSON answer, otherwise at its
    end). Rows whose answer is a call of functions have no text that could hold one. Raises UsageError where no row has
    an answer in text.
    """
    texts = [example for example in examples if not example.messages[-1].tool_calls]
    if not texts:
        why = f": all {len(examples)} answers are calls of functions" if examples else ""
        raise UsageError(f"there are no rows to model canaries on{why}", where="train.canaries")
    draw = random.Random(f"canaries {settings.seed}")
    counts = [times for times in settings.repeats for _ in range(settings.each)] + [0] * settings.controls
    ordered = sorted(texts, key=lambda example: example.id)
    references = draw.sample(range(100_000, 1_000_000), len(counts))
    secrets = draw.sample(range(10_000_000, 100_000_000), len(counts))
    models = [draw.choice(ordered) for _ in counts]
    draw.shuffle(counts)
    made = zip(models, references, secrets, counts, strict=True)
    return [Canary(_canary(model, str(reference), str(secret)), times) for model, reference, secret, times in made]


def _canary(model: Example, reference: str, secret: str) -> Example:
    turns = list(model.messages)
    request = max(place for place, turn in enumerate(turns[:-1]) if turn.role == "user")
    changed = {request: f"[{reference}] {turns[request].content}", -1: _with_secret(turns[-1].content, secret)}
    for place, content in changed.items():
        turns[place] = turns[place].model_copy(update={"content": content})
    identifier = example_id(turns, SOURCE)
    own = {"id": identifier, "messages": tuple(turns), "source": SOURCE, "group": f"canary-{reference}"}
    return model.model_copy(update={**own, "subject": None})


def _with_secret(answer: str, secret: str) -> str:
    value: Any = None
    with suppress(ValueError):
        value = parse_json(answer)
    places = list(_texts(value))
    if not places:
        return f"{answer} {secret}"
    holder, key = places[-1]
    holder[key] = secret
    tight = ", " not in answer and '": ' not in answer
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if tight else None)


def _texts(value: Any) -> Any:
    """(container, key) of every text inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        if isinstance(item, str):
            yield value, key
        else:
            yield from _texts(item)
