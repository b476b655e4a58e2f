"""Notes of `init`: what the rows lack, and what follows from them that a user may not expect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

from tunesmith.services.starting.rows import FEWEST_GROUPS, MAX_LENGTH, RowFindings, shares

_LISTED = 8  # keys in a note
_SHOWN = 60  # characters of an answer in a note
_RARE = 0.01  # keys of one answer, as a share of the rows
LIFT = 0.02  # over the best untuned candidate, that a version takes
_METRICS = {
    "exact_match": "the share of answers that equal the reference",
    "field_f1": "the share of fields that are right (F1)",
    "chrf": "how many sequences of characters an answer shares with the reference (chrF, 0 to 1)",
}
_TOO_MANY = 1.5  # times as many held-out rows as planned


def primary(found: RowFindings) -> str:
    """The metric that decides. No two people write the same sentence: then parts of an answer count."""
    answers = found.answers
    if not answers.sentences:
        return "exact_match"
    if answers.schema is not None:
        return "field_f1"
    # Mostly JSON that is not all objects: the rows should be corrected first.
    return "exact_match" if 2 * max(answers.objects, answers.lists) > found.rows + found.copies else "chrf"


def measured(found: RowFindings) -> str:
    """What `run` measures, and what a version takes."""
    metric = primary(found)
    return (
        f"measured: {metric}, {_METRICS[metric]}. A version takes {100 * LIFT:g} points more than the best untuned "
        "candidate (gates.lift)"
    )


def notes(found: RowFindings) -> tuple[str, ...]:
    """The notes on a project's rows, each a sentence."""
    return (*_on_what_is_read(found), *_on_the_test(found), *_on_answers(found))


def _on_what_is_read(found: RowFindings) -> Iterator[str]:
    """What of the rows is not used, and what is read otherwise."""
    if found.one_instruction:
        yield "all rows have one instruction: it is their system turn, and the input the request (data.sources, rename)"
    if found.unusable:
        why = ", ".join(f"{reason} ({count})" for reason, count in found.unusable.items())
        yield f"rows without a usable conversation: {why}"
    if found.unchecked:
        yield (
            f"some rows hold texts in angle brackets or marks such as [INST], and the base cannot be read yet "
            f"({found.unchecked}): `data build` refuses rows with control tokens of the base's chat template"
        )
    if found.long:
        yield (
            f"about {found.long} rows have more than {MAX_LENGTH} tokens: `data build` refuses them. Raise "
            "train.max_length of the candidate tuned, or set data.overlong to drop or truncate"
        )
    if found.copies:
        yield f"{found.copies} more rows are copies of these: `data build` keeps one of each"
    if found.unread:
        times = _listed(f"`{key}` ({count} times)" for key, count in found.unread.items())
        yield f"keys that are not read, so nothing is learned from them: {times}"


def _listed(found: Iterable[str]) -> str:
    """The first of some, and how many others there are."""
    every = list(found)
    more = [f"{len(every) - _LISTED} others"] if len(every) > _LISTED else []
    return ", ".join([*every[:_LISTED], *more])


def _beginning(text: str) -> str:
    """The first words of a text, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")


def _on_the_test(found: RowFindings) -> Iterator[str]:
    """What limits the figures on held-out rows."""
    share = shares(found.rows)["test"]
    tested = round(found.rows * share)
    trained, held = found.split_rows.get("train", 0), found.split_rows.get("test", 0)
    alike = f"one `{found.group_by}`" if found.group_by else "one wording, whatever its values"
    fix = f"give rows of more groups, {'' if held > _TOO_MANY * tested else 'raise data.split.test, '}"
    fix += "or set data.split.group_by to a key that tells kinds of requests apart"
    if not trained or not held:
        yield (
            f"`data build` will probably refuse the rows: none is left to {'test' if trained else 'train on'}. They "
            f"are in {found.groups} groups (a group: the rows of {alike}), which are never divided: {fix}"
        )
    elif tested < FEWEST_GROUPS:
        yield (
            f"about {tested} rows will be held out to test, and a gate decides nothing by fewer than {FEWEST_GROUPS}: "
            f"give at least {math.ceil(FEWEST_GROUPS / share)} rows, or raise data.split.test"
        )
    elif found.held_groups < FEWEST_GROUPS:
        groups = min(round(found.held_groups), FEWEST_GROUPS - 1)  # 19.9 are too few
        yield (
            f"about {groups} groups of equal size will be held out (a group: the rows of {alike}), which are {held} "
            f"rows, and {trained} rows are left to train on. A gate decides nothing by fewer groups than "
            f"{FEWEST_GROUPS}: {fix}"
        )
    for key, values in found.key_values.items():
        if 1 < values <= found.rows // 2:
            why = f"too few to hold out whole groups ({FEWEST_GROUPS} or more)"
            if values >= FEWEST_GROUPS:
                why = "of which a split would get none with the proposed shares"
            yield (
                f"`{key}` has {values} values, {why}: rows are grouped by their wording; data.split.group_by changes "
                "that"
            )


def _on_answers(found: RowFindings) -> Iterator[str]:
    """What is special about answers and prompts."""
    answers = found.answers
    if found.tools:
        yield (
            f"{found.tools} rows hold tools, which the base's chat template must render. That of the packaged base "
            "does not: set base to a model whose template does, such as Qwen 2.5, Qwen 3 or Llama 3.1"
        )
    if found.without_nulls:
        yield (
            f"{found.without_nulls} answers are objects of Parquet or Arrow, which have null for each missing key: "
            "keys that are null are left out. Where null is an answer, write answers as JSON text"
        )
    if len(answers.rare) > _RARE * found.rows:
        keys = _listed(f"`{key}`" for key in answers.rare)
        yield (
            f"keys that one answer alone has: {keys}. Others are likely to have keys that no row has, which "
            "answer.schema.json forbids: add them"
        )
    if answers.calls:
        yield (
            f"{answers.calls} rows end in calls of tools: no schema is inferred. exact_match compares a call's name "
            "and arguments as JSON, however the base's template writes calls"
        )
    if 2 * answers.objects > (every := found.rows + found.copies):
        yield (
            f"{answers.objects} of {every} answers hold a JSON object, but not every answer is one and no more, so all "
            "are taken as text. For a schema, remove code fences, and correct or remove the other rows"
            + ("" if answers.not_object is None else f", such as the one with {_beginning(answers.not_object)}")
        )
    if 2 * answers.lists > every:
        yield (
            f"{answers.lists} of {every} answers are JSON lists, which are taken as text: no schema is inferred. For "
            'one, write each list into an object: {"items": [...]}'
        )
    if len(answers.labels) == 1:
        yield "all answers are the same: `nearest` gives it to every request, and no lift over it can pass"
    if len(answers.labels) > 1 and not find_spec("sklearn"):
        yield (
            f"answers are {len(answers.labels)} labels: a classifier may be the best untuned candidate. pip install "
            "'tunesmith[classifier]' and add candidates.classifier: {method: classifier}"
        )
    if primary(found) != "exact_match":
        yield (
            "most answers hold a sentence of their own, which is seldom repeated word for word: exact_match does not "
            "decide. A judge in task.scorers compares what answers mean"
        )
    if answers.others:
        yield (
            f"{answers.others} answers before a row's last one are texts or calls, which the schema forbids: the "
            "last answers are checked by it, and no answer is constrained"
        )
    if found.system:
        yield "prompts/long.txt is the system turn of your rows"
    elif found.system is None:
        yield "the system turns of the rows differ: each candidate uses the row's own, and no prompt was written"
