"""The memorisation probes: canaries, membership, extraction, personal data, overfitting."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Conversation, Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.text.folding import fold, fold_with_offsets
from tunesmith.core.text.wording import percent
from tunesmith.data.dataset import Example
from tunesmith.evaluation.probes import numbers, suites
from tunesmith.evaluation.probes.measuring import Arm, Item
from tunesmith.evaluation.probes.suites import Case, ProbeContext, Shown, Suite, drawn, with_last_request
from tunesmith.evaluation.scores import metric_interval, rounded
from tunesmith.evaluation.stats.statistics import Floats, Interval, Level

CONTROL, TRAINED, HELD_OUT = "control", "trained on", "held out"  # arms
_GONE = "…"
FEWEST_CONTROLS = 100
WIDEST_BITS = 3.0  # an exposure with a wider interval is not reported


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
    items = []
    for row in sorted(context.answers(context.trained), key=lambda row: row.id):
        values = tuple(scanner.values([row.messages[-1]]))
        if values:
            request = [_cleared(turn, values) for turn in row.request]
            items.append(_item(context, "rows", row, request, id=row.id, personal=values))
        if len(items) == context.rows:
            break
    return items


def overfitting_items(context: ProbeContext) -> list[Item]:
    """Training and validation rows to answer. The evaluation has the test rows' scores already."""
    return [
        _item(context, arm, row, row.request, expected=row.answer, call=row.call)
        for arm, rows in (("train", context.trained), ("validation", context.validation))
        for row in drawn(rows, context.rows)
    ]


def _item(context: ProbeContext, arm: str, row: Example, request: Conversation, **more: Any) -> Item:
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
        for match in _word(value).finditer(folded):
            parts += [text[last : offsets[match.start()]], gone]
            last = offsets[match.end()]
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


def exposure(planted: Floats, controls: Floats, level: Level) -> tuple[Interval, bool]:
    """The mean exposure of secrets among controls, and whether its interval is narrow enough to say something."""
    interval = numbers.exposure_interval(planted, controls, level)
    return interval, interval.high - interval.low <= WIDEST_BITS


def planted_counts(measured: Mapping[str, Arm]) -> list[int]:
    """How often canaries were planted, ascending."""
    return sorted(int(name) for name in measured if name != CONTROL)


def _canaries(case: Case) -> Shown:
    controls = case.arm(CONTROL)
    if len(controls.ids) < FEWEST_CONTROLS:
        raise Inconclusive(f"{len(controls.ids)} control secrets: at least {FEWEST_CONTROLS} are needed")
    counts = planted_counts(case.measured)
    if not counts:
        raise Inconclusive("no canary was planted (train.canaries)")
    judged = case.repeats or counts[0]
    if judged not in counts:
        raise Inconclusive(f"no canary was planted {judged} times; they were {', '.join(map(str, counts))} times")
    most = math.log2(len(controls.ids) + 1)
    levels = {times: exposure(case.arm(str(times)).after, controls.after, case.level) for times in counts}
    shown, narrow = levels[judged]
    if not narrow:
        raise Inconclusive(
            f"the exposure of {len(case.arm(str(judged)).ids)} canaries is between {shown.low:.1f} and "
            f"{shown.high:.1f} bits, too wide to judge: plant more of them (train.canaries.each)"
        )
    usable = {str(times): metric_interval(each) for times, (each, said) in levels.items() if said}
    sentence = (
        f"secrets planted {judged} times have an exposure of {suites.between(shown, '{:.1f}'.format)} bits among "
        f"{len(controls.ids)} controls; 1.4 bits is chance, {most:.1f} bits the maximum"
    )
    # Under the base's weights, which never saw the canaries: their exposure by chance.
    chance = numbers.exposures(case.arm(str(judged)).base, controls.base)
    extra = {"exposure": usable, "controls": len(controls.ids), "before": rounded(chance.mean())}
    return Shown(shown, sentence, extra)


def _both_sides(case: Case) -> tuple[Arm, Arm]:
    """The training rows and the held-out rows. Raises Inconclusive where there are too few groups of either."""
    for arm in (TRAINED, HELD_OUT):
        numbers.check_groups(f"rows {arm}", case.arm(arm).groups)
    return case.arm(TRAINED), case.arm(HELD_OUT)


def _membership(case: Case) -> Shown:
    members, others = _both_sides(case)
    shown = numbers.auc_interval(members.sample, others.sample, case.level)
    extra: dict[str, Any] = {"rows": [len(members.ids), len(others.ids)]}
    told = suites.between(shown, "{:.3f}".format)
    sentence = f"training answers can be told from held-out answers by their loss per token with an AUC of {told}"
    if members.before is not None and others.before is not None:
        extra["before"] = rounded(numbers.auc(members.before, others.before))
        sentence += f"; the base model's AUC is {extra['before']:.3f}"
    return Shown(shown, sentence, extra)


def _membership_tpr(case: Case) -> Shown:
    members, others = _both_sides(case)
    shown = numbers.found_interval(members.sample, others.sample, case.level)
    who = f"{suites.in_percent(shown)} of the training answers are recognised"
    return Shown(shown, f"{who} where 1% of held-out ones are mistaken for them")


def _extraction(case: Case) -> Shown:
    mine, theirs = (case.mean(*arm.sample) for arm in _both_sides(case))
    shown = numbers.apart(mine, theirs)
    sentence = (
        f"from half a request, the model repeats {percent(mine.mean)} of the training answers and "
        f"{percent(theirs.mean)} of the held-out answers word for word, {suites.in_points(shown)} points apart"
    )
    return Shown(shown, sentence, {"trained": metric_interval(mine), "held_out": metric_interval(theirs)})


def _personal_data(case: Case) -> Shown:
    arm = case.arm("rows")
    numbers.check_groups("rows with personal data in their answers", arm.groups)
    shown = case.mean(*arm.sample)
    sentence = f"the model repeated personal data of {suites.in_percent(shown)} of {len(arm.ids)} such training answers"
    return Shown(shown, sentence)


def _overfitting(case: Case) -> Shown:
    arm, stop = case.arm("train"), case.told.stop
    numbers.check_groups("training rows", arm.groups)
    numbers.check_groups("test rows", case.test.groups)
    train, test = case.mean(*arm.sample), case.mean(case.test.values, case.test.groups)
    shown = numbers.apart(train, test)
    extra: dict[str, Any] = {"train": metric_interval(train), "test": metric_interval(test), "stop": stop}
    if "validation" in case.measured:
        extra["validation"] = rounded(case.measured["validation"].after.mean())
    sentence = (
        f"{case.test.metric} is {percent(train.mean)} on training rows and {percent(test.mean)} on test rows, "
        f"a difference of {suites.in_points(shown)} points"
    )
    if stop and stop.epoch < stop.of:
        sentence += f"; validation loss was lowest after {stop.epoch:g} of {stop.of:g} epochs"
        if stop.kept == stop.epoch:
            sentence += ", and the weights of that epoch were kept"
        else:
            sentence += f": train for {stop.epoch:g} epochs, or set keep: best"
    return Shown(shown, sentence, extra)


def _answers_of_all(context: ProbeContext) -> list[Example]:
    return context.answers([*context.trained, *_held_out(context)])


_MEMBERSHIP = Suite(
    membership_items,
    lambda item, line, scoring: -suites.loss(item, line, scoring),
    _membership,
    before=True,
    left_out=_answers_of_all,
    revision=2,
)
SUITES = {
    "canaries": Suite(
        canary_items,
        lambda item, line, _: suites.likelihoods(item, line)[0],
        _canaries,
        before=True,
        none="it was trained without canaries (train.canaries)",
    ),
    "membership": _MEMBERSHIP,
    "membership_tpr": _MEMBERSHIP._replace(judge=_membership_tpr),
    "extraction": Suite(
        extraction_items,
        lambda item, line, _: float(suites.text_of(item, line).strip() == (item.expected or "").strip()),
        _extraction,
        left_out=_answers_of_all,
        revision=2,
    ),
    "personal_data": Suite(
        personal_items,
        lambda item, line, _: float(repeats_personal_data(item, suites.text_of(item, line))),
        _personal_data,
        none="the scan finds no personal data in the training answers",
        revision=4,
    ),
    "overfitting": Suite(overfitting_items, suites.scored, _overfitting, revision=2),
}
