"""The example's rows: deterministic, valid under the example's schema, and understood by hassil's own recogniser."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest

from tunesmith.project import parse_settings

pytest.importorskip("hassil", reason="the example's package hassil is not installed (extra: demo)")
pytest.importorskip("home_assistant_intents", reason="home-assistant-intents is not installed (extra: demo)")

EXAMPLE = Path(__file__).parents[2] / "examples" / "home_intents"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_rows", EXAMPLE / "make_rows.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_rows"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(maker: ModuleType) -> list[dict]:
    return maker.sample_rows()[0]


def test_its_project_file_is_valid() -> None:
    text = (EXAMPLE / "tunesmith.yaml").read_text()
    assert "control" in parse_settings(text, "tunesmith.yaml").candidates


def test_same_seed_same_rows(maker: ModuleType, rows: list[dict]) -> None:
    assert maker.sample_rows(seed=0)[0] == rows
    assert maker.sample_rows(seed=1)[0] != rows


def test_enough_rows_and_one_answer_an_utterance(rows: list[dict]) -> None:
    assert 3000 <= len(rows) <= 4500
    assert len({row["template"] for row in rows}) >= 850
    requests = [row["messages"][0]["content"] for row in rows]
    assert len(requests) == len(set(requests))


def test_answers_are_compact_sorted_and_valid(rows: list[dict]) -> None:
    schema = json.loads((EXAMPLE / "intent.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    intents, slots = set(), set()
    for row in rows:
        text = row["messages"][-1]["content"]
        answer = json.loads(text)
        validator.validate(answer)
        assert text == json.dumps({**answer, "slots": dict(sorted(answer["slots"].items()))}, separators=(",", ":"))
        intents.add(answer["intent"])
        slots.update(answer["slots"])
    assert intents == set(schema["properties"]["intent"]["enum"])
    assert slots == set(schema["properties"]["slots"]["properties"])


def test_hassil_understands_the_rows_as_their_answers(maker: ModuleType, rows: list[dict]) -> None:
    """Texts filled by us are given to hassil as lists; each sampled row must have its own answer among the readings."""
    import importlib.resources

    import yaml
    from hassil.intents import Intents, TextSlotList, WildcardSlotList
    from hassil.recognize import recognize_all

    data = json.loads((importlib.resources.files("home_assistant_intents") / "data" / "en.json").read_text())
    words = yaml.safe_load((EXAMPLE / "words.yaml").read_text())
    names = [(name, name, {"domain": domain}) for domain, spoken in words["names"].items() for name in spoken]
    lists = {
        "area": TextSlotList.from_strings(words["area"], name="area"),
        "floor": TextSlotList.from_strings(words["floor"], name="floor"),
        "name": TextSlotList.from_tuples(names, name="name"),
    }
    intents = Intents.from_dict(data)
    assert any(isinstance(values, WildcardSlotList) for values in intents.slot_lists.values())
    for row in rows[::61]:
        request, answer = (turn["content"] for turn in row["messages"])
        wanted = json.loads(answer)
        readings = [
            {"intent": result.intent.name, "slots": {name: entity.value for name, entity in result.entities.items()}}
            for result in recognize_all(request, intents, slot_lists=lists, intent_context={"area": "kitchen"})
        ]
        # hassil adds the speaker's room, and takes a last "please" and outer spaces into a wildcard.
        for reading in readings:
            if "area" not in wanted["slots"] and reading["slots"].get("area") == "kitchen":
                reading["slots"].pop("area")
            reading["slots"] = {
                name: value.strip().removesuffix(" please") if isinstance(value, str) else value
                for name, value in reading["slots"].items()
            }
        assert wanted in readings, (request, wanted, readings)
