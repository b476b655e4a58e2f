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
    requests = [row["messages"][0]["content"] for row in rows]
    assert len(requests) == len(set(requests)) > 3000


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
