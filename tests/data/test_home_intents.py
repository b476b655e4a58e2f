"""The example's rows: deterministic, valid under the example's schema, and understood by hassil's own recogniser."""

import json
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest

from tunesmith.project import parse_settings

pytest.importorskip("hassil", reason="the example's package hassil is not installed (extra: demo)")
pytest.importorskip("home_assistant_intents", reason="home-assistant-intents is not installed (extra: demo)")

EXAMPLE = Path(__file__).parents[2] / "examples" / "home_intents"


def test_rows_are_the_same_each_time_compact_sorted_and_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    maker = import_module("make_rows")
    rows = maker.sample_rows()[0]
    assert maker.sample_rows(seed=0)[0] == rows
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) > 3000
    schema = json.loads((EXAMPLE / "intent.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    intents = set()
    for row in rows:
        answer = json.loads(row["messages"][-1]["content"])
        validator.validate(answer)
        intents.add(answer["intent"])
    assert intents == set(schema["properties"]["intent"]["enum"])
    text = (EXAMPLE / "tunesmith.yaml").read_text()
    assert "wrong-prompt" in parse_settings(text, "tunesmith.yaml").candidates
