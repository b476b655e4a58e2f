"""Items of the bias probes: names and genders swapped in the project's rows, BBQ, and CrowS-Pairs.

The gate judges the change by tuning: each item is measured under the base's weights and under the tuned weights.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.core.reading.text_files import LARGEST_DATA, read_text_file
from tunesmith.data.quality.people import FIRST_NAMES
from tunesmith.evaluation.probes.context import ProbeContext
from tunesmith.evaluation.probes.items import Item

# Male and female words that correspond. `her` means both his and him: the next word decides.
_PAIRS = """
he/she himself/herself man/woman men/women boy/girl boys/girls father/mother fathers/mothers dad/mum
son/daughter sons/daughters brother/sister brothers/sisters husband/wife uncle/aunt nephew/niece
grandfather/grandmother grandson/granddaughter boyfriend/girlfriend mr/mrs sir/madam gentleman/lady
gentlemen/ladies male/female males/females king/queen prince/princess actor/actress waiter/waitress
"""
_WORDS = dict(pair.split("/") for pair in _PAIRS.split())
_WORD = re.compile(r"[^\W\d_]+")
_SCENE = "Write one sentence."
PER_TOKEN = " per token"  # noqa: S105 - ends an arm's name


def swap_items(context: ProbeContext) -> list[Item]:
    """Held-out rows with a name or a gendered word, in two versions: male and female, or names from two regions.

    Request and answer are swapped alike. Measured is the right answer's probability, which should be similar in both
    versions, and its probability per token: a whole answer of many tokens has a probability of about 0 in any version.
    ID/a and ID/b are a pair. Answers that are calls of functions are left out.
    """
    found: list[Item] = []
    for arm, first, second in (
        ("gender", _mapping(male=True), _mapping(male=False)),
        ("names", _places(0), _places(2)),
    ):
        pairs = 0
        for row in sorted(context.test, key=lambda row: row.id):
            if row.messages[-1].tool_calls:
                continue
            versions = [[_swapped(turn, table) for turn in row.messages] for table in (first, second)]
            if versions[0][:-1] == versions[1][:-1] or pairs == context.rows:
                continue
            pairs += 1
            for side, version in zip("ab", versions, strict=True):
                asked: dict[str, Any] = {"messages": context.put(row, version[:-1]), "choices": (version[-1].content,)}
                for each in (arm, arm + PER_TOKEN):
                    found.append(Item(id=f"{each}:{row.id}/{side}", group=row.group, arm=each, **asked))
    return found


def swap_calls(context: ProbeContext) -> int:
    """How many held-out answers are calls of functions, which the swap probe leaves out."""
    return sum(bool(row.messages[-1].tool_calls) for row in context.test)


def bbq_items(context: ProbeContext) -> list[Item]:
    """BBQ's ambiguous questions, which only a stereotype could answer (Parrish et al. 2022, Findings of ACL).

    The choices are the stereotyped answer, the other person, and "unknown". Rows whose stereotype is not about exactly
    one of the two persons are left out. Rows of one question template are one group.
    """
    found = []
    for row in _jsonl(_needed(context)):
        order = _stereotyped_first(row)
        if row.get("context_condition") == "ambig" and order is not None:
            asked = Message(role="user", content=f"{row['context']} {row['question']}")
            group = f"{row['category']}-{row['question_index']}"
            identifier = f"{row['category']}-{row['example_id']}"
            choices = tuple(str(row[f"ans{place}"]) for place in order)
            found.append(Item(id=identifier, group=group, arm="ambiguous", messages=(asked,), choices=choices))
    return _some(found, context.rows)


def crows_pairs_items(context: ProbeContext) -> list[Item]:
    """CrowS-Pairs (Nangia et al. 2020, EMNLP): the more stereotyping sentence and the less stereotyping one."""
    found = []
    path = _needed(context)
    try:
        for place, row in enumerate(csv.DictReader(io.StringIO(read_text_file(path, "CrowS-Pairs", LARGEST_DATA)))):
            found.append(
                Item(
                    id=f"{row['bias_type']}-{place}",
                    group=str(place),
                    arm="pairs",
                    messages=(Message(role="user", content=_SCENE),),
                    choices=(row["sent_more"], row["sent_less"]),
                )
            )
    except (KeyError, ValueError, csv.Error) as error:
        raise UsageError(f"not CrowS-Pairs: {error}", where=str(path), fix="give crows_pairs_anonymized.csv") from error
    return _some(found, context.rows)


def _mapping(*, male: bool) -> Callable[[str, str], str]:
    """A function (word, next word) -> word that gives every gendered word and name one gender."""
    table = {b: a for a, b in _WORDS.items()} if male else dict(_WORDS)
    for names in FIRST_NAMES:
        for he, she in ((names[0], names[1]), (names[2], names[3])):
            table[(she if male else he).lower()] = (he if male else she).lower()

    def change(word: str, following: str) -> str:
        lower = word.lower()
        if male and lower == "her":
            return _cased("his" if following else "him", word)
        if not male and lower in ("his", "him"):
            return _cased("her", word)
        if lower in _LOWER_NAMES and not word[0].isupper():
            return word  # mark, grace and will are ordinary words too
        return _cased(table[lower], word) if lower in table else word

    return change


def _places(column: int) -> Callable[[str, str], str]:
    """A function (word, next word) -> word that replaces every name by one from one region, of the same gender."""
    table = {names[place].lower(): names[column + place % 2] for names in FIRST_NAMES for place in range(4)}

    def change(word: str, following: str) -> str:
        return _cased(table[word.lower()], word) if word[0].isupper() and word.lower() in table else word

    return change


_LOWER_NAMES = frozenset(name.lower() for names in FIRST_NAMES for name in names)


def _swapped(turn: Message, change: Callable[[str, str], str]) -> Message:
    """The turn with the words of its content and of its calls' arguments changed. Its tools stay as they are."""

    def replaced(match: re.Match[str]) -> str:
        following = _WORD.match(match.string[match.end() :].lstrip(" "))
        return change(match[0], following[0] if following else "")

    calls = [call.model_copy(update={"arguments": _WORD.sub(replaced, call.arguments)}) for call in turn.tool_calls]
    return turn.model_copy(update={"content": _WORD.sub(replaced, turn.content), "tool_calls": tuple(calls)})


def _cased(word: str, like: str) -> str:
    return word.upper() if like.isupper() and len(like) > 1 else word.capitalize() if like[0].isupper() else word


def _stereotyped_first(row: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Positions of the stereotyped answer, the other person and "unknown"; None where the row does not say."""
    try:
        info = [row["answer_info"][f"ans{place}"] for place in range(3)]
        named = {str(name).lower() for name in row["additional_metadata"]["stereotyped_groups"]}
        negative = row["question_polarity"] == "neg"
    except (KeyError, TypeError):
        return None
    unknown = [place for place in range(3) if info[place][1] == "unknown"]
    about = [
        place for place in range(3) if place not in unknown and {str(each).lower() for each in info[place]} & named
    ]
    if len(unknown) != 1 or len(about) != 1:
        return None
    other = 3 - unknown[0] - about[0]
    return (about[0], other, unknown[0]) if negative else (other, about[0], unknown[0])


def _needed(context: ProbeContext) -> Path:
    if context.path is None:
        raise UsageError("this probe needs a data set", fix="set the gate's path")
    return context.path


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UsageError("the folder has no .jsonl file", where=str(path))
    for file in files:
        for number, line in enumerate(read_text_file(file, "BBQ", LARGEST_DATA).split("\n"), start=1):
            try:
                row = parse_json(line) if line.strip() else None
            except NotJson as error:
                where = f"{file}, line {number}"
                raise UsageError(f"not BBQ's JSONL: {error}", where=where, fix="give its .jsonl files") from error
            if row is not None:
                yield row


def _some(items: list[Item], many: int) -> list[Item]:
    return items if len(items) <= many else random.Random(0).sample(items, many)
