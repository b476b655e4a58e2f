"""A whole project on a tiny random base: small enough to go through the chain in seconds."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.schemas import closed
from tests.tiny import write_model

ROOMS = ("kitchen", "hall", "attic", "cellar", "study", "porch", "garage", "office", "den", "loft")
THINGS = ("light", "fan", "heater", "radio", "blind", "lamp")
SCHEMA = closed({"on": {"type": "boolean"}, "room": {"enum": [*ROOMS]}, "thing": {"enum": [*THINGS]}})


# Half of a run would be spent on loading the recognisers of personal data and measuring their detection recall, which
# tests/data/privacy does.
PRIVACY: dict[str, Any] = {"entities": ["SECRET"], "synthetic_values": 0}


def rows() -> list[dict[str, Any]]:
    """120 commands; each is a group of its own: fewer than twenty held-out groups decide nothing."""
    found = []
    for room in ROOMS:
        for thing in THINGS:
            for verb in ("on", "off"):
                answer = json.dumps({"on": verb == "on", "room": room, "thing": thing}, separators=(",", ":"))
                request = {"role": "user", "content": f"turn {verb} {room} {thing}"}
                turns = [request, {"role": "assistant", "content": answer}]
                found.append({"messages": turns, "template": f"{verb} {room} {thing}"})
    return found


def settings() -> dict[str, Any]:
    """The project file as data."""
    return {
        "name": "tiny",
        "base": "model",
        "data": {
            "sources": [{"path": "rows.jsonl", "licence": "CC0-1.0"}],
            "duplicates": {"near": None},
            "split": {"validation": 0.1, "test": 0.3, "group_by": "template"},
            "privacy": PRIVACY,
        },
        "task": {"schema": "schema.json", "scorers": ["json_valid", "exact_match"]},
        "candidates": {
            "plain": {"prompt": "prompt.txt", "max_tokens": 8},
            "held": {"prompt": "prompt.txt", "max_tokens": 40, "constrain": True},
            "rag": {"prompt": "prompt.txt", "retrieve": {"from": "train", "k": 1}, "max_tokens": 8},
            "tuned": {"prompt": "prompt.txt", "train": {"epochs": 1, "rank": 2, "batch": 8}, "max_tokens": 8},
        },
        "gates": {"valid": {"metric": "json_valid", "at_least": 0.0}},
    }


def write_project(folder: Path, **changes: object) -> Path:
    """A project folder; changes replace keys of the project file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_model(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "prompt.txt").write_text("Answer with JSON.\n")
    (folder / "tunesmith.yaml").write_text(yaml.safe_dump({**settings(), **changes}, sort_keys=False))
    return folder
