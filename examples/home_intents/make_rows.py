"""Write the example's rows: voice commands for a smart home and the JSON that each one means.

The sentence templates are those of the package home-assistant-intents (English), parsed by hassil. Each row is one
random expansion of one template: what the template leaves open is filled from words.yaml and becomes a slot of the
answer. The same seed gives the same bytes.

    python make_rows.py                  # data/home_intents.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hassil.expression import Alternative, Expression, ListReference, Permutation, RuleReference, Sequence, TextChunk
from hassil.intents import Intents, RangeSlotList, TextSlotList
from hassil.parse_expression import parse_sentence

HERE = Path(__file__).parent
_TRIES = 40

# Expansions that the grammar allows and nobody says: doubled words, "the any", "lamp light", "the the lake house".
_UNNATURAL = re.compile(
    r"\b(\w+) \1\b"
    r"|\b(the|my|our|every|each|single|there) (the|my|our)\b"
    r"|\b(the|my|our) (any|some|all|every|each|a)\b"
    r"|\b(every|each|single)( \w+)? (lights|lamps|fans)\b"
    r"|\b(lights?|lamps?|lighting|sconce|chandelier|pendant|spotlights) (lights?|lamps?|lighting)\b"
    r"|\b(upstairs|downstairs|basement|attic|mezzanine|level) floor\b"
    r"|\b(an) \d|\ba (8|11|18|8\d)\b"
    r"|1/2"
)
_STARTS_A_REQUEST = re.compile(
    r"(turn|switch|set|open|close|shut|start|stop|pause|play|add|put|remove|make|change|increase|decrease|skip|lock|"
    r"unlock|mute|unmute|clean|vacuum|cancel|resume|activate|announce|broadcast|tell|delete|raise|lower) "
)


@dataclass
class Expansion:
    """One random walk through a template: the text so far, the slots met, what narrows later choices."""

    rng: random.Random
    intents: Intents
    words: Mapping[str, Any]
    domains: tuple[str, ...]
    media_class: str
    slots: dict[str, Any] = field(default_factory=dict)


def expand(expression: Expression, walk: Expansion) -> str:
    """One random text of the expression; slots met on the way are put into walk.slots."""
    if isinstance(expression, TextChunk):
        return expression.original_text
    if isinstance(expression, RuleReference):
        return expand(walk.intents.expansion_rules[expression.rule_name].expression, walk)
    if isinstance(expression, ListReference):
        text, value = _fill(expression.list_name, walk)
        walk.slots[expression.slot_name] = value
        return text
    if isinstance(expression, Alternative):
        return expand(walk.rng.choices(expression.items, _weights(expression))[0], walk)
    if isinstance(expression, Permutation):
        parts = [expand(item, walk) for item in expression.items]
        if walk.rng.random() < 0.5:
            walk.rng.shuffle(parts)
        return " ".join(parts)
    if isinstance(expression, Sequence):
        return "".join(expand(item, walk) for item in expression.items)
    raise TypeError(f"hassil has an expression this sampler does not know: {type(expression).__name__}")


def _weights(choice: Alternative) -> list[float]:
    """The first wording is the usual one ("in" before "across"); an optional part is there half the time."""
    weights = [(place + 1) ** -1.5 for place in range(len(choice.items))]
    if choice.is_optional:  # hassil puts the empty text last
        weights[-1] = sum(weights[:-1]) / (4 if _is_plural_ending(choice.items[0]) else 1)
    return weights


def _is_plural_ending(expression: Expression) -> bool:
    chunk = expression.items[0] if isinstance(expression, Sequence) and len(expression.items) == 1 else expression
    return isinstance(chunk, TextChunk) and chunk.text in ("s", "es")


def _fill(list_name: str, walk: Expansion) -> tuple[str, Any]:
    """(what is said, what goes into the slot) for one {list}."""
    rng, words = walk.rng, walk.words
    if list_name in ("area", "floor"):
        return _same(rng.choice(words[list_name]))
    if list_name == "name":
        return _same(rng.choice(words["names"][rng.choice(walk.domains)]))
    if list_name == "search_query":
        return _same(rng.choice(words["media"][walk.media_class]))
    if list_name in words["texts"]:
        return _same(rng.choice(words["texts"][list_name]))
    values = walk.intents.slot_lists[list_name]
    if isinstance(values, RangeSlotList):
        number = NUMBERS[list_name](rng)
        return str(number), int(number * values.multiplier) if values.multiplier else number
    if isinstance(values, TextSlotList):
        fitting = [
            value for value in values.values if list_name != "media_class" or value.value_out == walk.media_class
        ]
        chosen = rng.choice(fitting)
        return expand(chosen.text_in, walk), chosen.value_out
    raise TypeError(f"no words for the list {list_name!r}: add it to words.yaml")


def _same(text: str) -> tuple[str, str]:
    return text, text


def _among(*numbers: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.choice(numbers)


def _percent(rng: random.Random) -> int:
    return rng.randrange(5, 101, 5) if rng.random() < 0.7 else rng.randint(1, 100)


def _step(rng: random.Random) -> int:
    return rng.randrange(5, 51, 5) if rng.random() < 0.8 else rng.randint(1, 30)


def _degrees(rng: random.Random) -> float | int:
    if rng.random() < 0.1:
        return rng.randint(16, 24) + 0.5
    return rng.randint(16, 26) if rng.random() < 0.6 else rng.randint(60, 78)


# How people choose numbers, within the range that the list of that name allows.
NUMBERS: dict[str, Callable[[random.Random], float | int]] = {
    "temperature": _degrees,
    "position": _percent,
    "fan_speed": _percent,
    "brightness": _percent,
    "volume": _percent,
    "volume_step_up": _step,
    "volume_step_down": _step,
    "color_temperature": lambda rng: rng.randrange(2000, 6600, 100),
    "timer_hours": lambda rng: rng.randint(1, 12),
    "timer_minutes": lambda rng: rng.randint(1, 60),
    "timer_seconds": _among(5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 75, 90),
}


def tidy(text: str) -> str:
    """One space between words, and the plural that the number asks for ("1 hour", "5 hours", "half an hour")."""
    text = " ".join(text.split())
    text = re.sub(r"\b(\d+)-(hour|minute|second)s?\b", r"\1-\2", text)
    text = re.sub(r"\b(\d+)-(hour|minute|second)\b(?! timer)", r"\1 \2", text)
    text = re.sub(r"\b1 (hour|minute|second)s\b", r"1 \1", text)
    text = re.sub(r"\b(?!1 )(\d+) (hour|minute|second)\b(?! timer)", r"\1 \2s", text)
    text = re.sub(r"\bhalf (an|a) (hour|minute)s\b", r"half \1 \2", text)
    return re.sub(r"\band (a )?half (hour|minute)\b", r"and a half \2s", text)


def _polite(text: str, rng: random.Random) -> str:
    """The words that mean nothing, as often as people say them."""
    draw = rng.random()
    if draw < 0.06:
        return f"{text} please"
    if draw < 0.18 and _STARTS_A_REQUEST.match(text):
        return f"{rng.choice(('please', 'please', 'can you', 'could you', 'would you'))} {text}"
    return text


def sample_rows(seed: int = 0, per_template: int = 4) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows, and how many were left out and why. Deterministic for a seed."""
    templates = json.loads((files("home_assistant_intents") / "data" / "en.json").read_text(encoding="utf-8"))
    intents, words = Intents.from_dict(templates), yaml.safe_load((HERE / "words.yaml").read_text(encoding="utf-8"))
    meanings: dict[str, str] = {}
    rows, left_out = [], {"same utterance, same answer": 0, "same utterance, other answer": 0, "unnatural": 0}
    for template, block, expression in _templates(templates):
        # Each template has a generator of its own: a template more or less leaves the others' rows as they are.
        rng = random.Random(f"{seed} {template}")
        for _ in range(per_template):
            drawn = _draw(expression, block, intents, words, rng)
            if drawn is None:
                left_out["unnatural"] += 1
                continue
            utterance, slots = drawn
            answer = json.dumps(
                {"intent": template.split("/")[0], "slots": dict(sorted(slots.items()))}, separators=(",", ":")
            )
            known = meanings.setdefault(utterance, answer)
            if known is not answer:
                left_out["same utterance, same answer" if known == answer else "same utterance, other answer"] += 1
                continue
            turns = [{"role": "user", "content": _polite(utterance, rng)}, {"role": "assistant", "content": answer}]
            rows.append({"messages": turns, "template": template})
    return rows, left_out


def _templates(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Expression]]:
    for intent, content in data["intents"].items():
        index = 0
        for block in content["data"]:
            for sentence in block["sentences"]:
                yield f"{intent}/{index}", block, parse_sentence(sentence).expression
                index += 1


def _draw(
    expression: Expression, block: Mapping[str, Any], intents: Intents, words: Mapping[str, Any], rng: random.Random
) -> tuple[str, dict[str, Any]] | None:
    """An utterance and its slots; None where every try sounded wrong."""
    domains = tuple(block.get("requires_context", {}).get("domain", ()))
    for _ in range(_TRIES):
        walk = Expansion(rng, intents, words, domains, rng.choice(sorted(words["media"])), dict(block.get("slots", {})))
        text = tidy(expand(expression, walk))
        if not _UNNATURAL.search(text):
            return text, walk.slots
    return None


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-template", type=int, default=4, help="expansions drawn from each sentence template")
    parser.add_argument("--into", type=Path, default=HERE / "data", help="the folder to write home_intents.jsonl into")
    arguments = parser.parse_args()
    rows, left_out = sample_rows(arguments.seed, arguments.per_template)
    write_rows(arguments.into / "home_intents.jsonl", rows)
    print(json.dumps({"rows": len(rows), "left out": left_out}), file=sys.stderr)


if __name__ == "__main__":
    main()
