"""Items of the memorisation probes: canaries, membership, extraction, personal data, overfitting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.text.folding import fold, fold_with_offsets
from tunesmith.data.dataset import Example
from tunesmith.evaluation.probes.context import ProbeContext, drawn, with_last_request
from tunesmith.evaluation.probes.items import Item

CONTROL, TRAINED, HELD_OUT = "control", "trained on", "held out"  # arms
_GONE = "…"


def canary_items(context: ProbeContext) -> list[Item]:
    """All canaries, planted and control: measures the probability of their answers."""
    return [
        Item(
            id=canary.example.id,
            group=canary.example.group,
            arm=str(canary.repeats) if canary.repeats else CONTROL,
            messages=context.put(canary.example, canary.example.request),
            choices=(canary.example.answer,),
        )
        for canary in context.canaries
    ]


def membership_items(context: ProbeContext) -> list[Item]:
    """Answers of training rows and of held-out rows: measures their loss per token (Yeom et al. 2018, CSF)."""
    return [_item(context, arm, row, row.request, choices=(row.answer,)) for arm, row in _both(context)]


def extraction_items(context: ProbeContext) -> list[Item]:
    """The first half of each request, which rarely determines the answer: does the model give the exact answer?

    Some answers can be guessed from half a request, so held-out rows are asked too, for comparison.
    """
    return [
        _item(context, arm, row, with_last_request(row.request, _half), expected=row.answer)
        for arm, row in _both(context)
    ]


def personal_items(context: ProbeContext) -> list[Item]:
    """Training answers with personal data in them, asked for with that data removed from the request."""
    from tunesmith.data.privacy.scan import Scanner

    scanner = Scanner(context.privacy)
    found = []
    for row in sorted(context.answers(context.trained), key=lambda row: row.id):
        values = tuple(scanner.values([row.messages[-1]]))
        if values:
            request = [_cleared(turn, values) for turn in row.request]
            found.append(_item(context, "rows", row, request, id=row.id, personal=values))
        if len(found) == context.rows:
            break
    return found


def overfitting_items(context: ProbeContext) -> list[Item]:
    """Training and validation rows to answer. The evaluation has the test rows' scores already."""
    return [
        _item(context, arm, row, row.request, expected=row.answer, call=row.call)
        for arm, rows in (("train", context.trained), ("validation", context.validation))
        for row in drawn(rows, context.rows)
    ]


def _item(context: ProbeContext, arm: str, row: Example, request: Sequence[Message], **more: Any) -> Item:
    """An item of a row: the request as training composed it."""
    turns = sum(message.role != "system" for message in request)
    own = {"id": f"{arm}:{row.id}", **more}
    return Item(group=row.group, arm=arm, messages=context.put(row, request), turns=turns, **own)


def _both(context: ProbeContext) -> Iterator[tuple[str, Example]]:
    """Answers in text, trained on and held out. The form of a call is the base's own: no text of it can be compared."""
    for arm, rows in ((TRAINED, context.trained), (HELD_OUT, _held_out(context))):
        texts = [row for row in context.answers(rows) if not row.messages[-1].tool_calls]
        for row in drawn(texts, context.rows):
            yield arm, row


def calls(context: ProbeContext) -> int:
    """How many answers, trained on and held out, are calls of functions, which membership and extraction leave out."""
    answers = context.answers([*context.trained, *_held_out(context)])
    return sum(bool(row.messages[-1].tool_calls) for row in answers)


def _held_out(context: ProbeContext) -> list[Example]:
    return [*context.validation, *context.test]


def _half(text: str) -> str:
    words = text.split()
    return " ".join(words[: max(1, len(words) // 2)])


def _without(text: str, values: Sequence[str], gone: str = _GONE) -> str:
    """The text without these values, however they are spelled there."""
    for value in sorted(filter(None, map(fold, values)), key=len, reverse=True):
        folded, offsets = fold_with_offsets(text)
        parts, last = [], 0
        for found in _word(value).finditer(folded):
            parts += [text[last : offsets[found.start()]], gone]
            last = offsets[found.end()]
        text = "".join((*parts, text[last:]))
    return text


def _cleared(turn: Message, values: Sequence[str]) -> Message:
    """The turn without these values in its content and in its calls' arguments, which stay JSON."""
    arguments = [json.dumps(parse_json(call.arguments), ensure_ascii=False) for call in turn.tool_calls]
    cleared = []
    for call, text in zip(turn.tool_calls, arguments, strict=True):
        changed = _without(text, values)
        try:
            parse_json(changed)
        except ValueError:  # the value was a number
            changed = _without(text, values, "0")
        cleared.append(call.model_copy(update={"arguments": changed}))
    return turn.model_copy(update={"content": _without(turn.content, values), "tool_calls": tuple(cleared)})


def repeats_personal_data(item: Item, text: str) -> bool:
    """Whether an answer contains personal data of its row that the request, calls and tools included, does not."""
    given, told = fold(" ".join(text for turn in item.messages for text in turn.shown_texts())), fold(text)
    return any(one.search(told) and not one.search(given) for one in map(_word, filter(None, map(fold, item.personal))))


def _word(value: str) -> re.Pattern[str]:
    """Finds a folded value that is no part of a word: Ann is not in planning. Other scripts write without spaces."""
    return re.compile(rf"(?<![a-z0-9]){re.escape(value)}(?![a-z0-9])")
