"""What `init` finds in rows, and what it says and writes of it."""

from __future__ import annotations

import pytest

from tests.attack_table import Happened
from tunesmith.services.inferred_schema import infer_schema
from tunesmith.services.new_project_rows import json_objects


def test_answers_that_are_not_all_objects_have_no_schema() -> None:
    assert json_objects(['{"a":1}', "text"]) == ([], 0)
    assert json_objects(["[1]", "2"]) == ([], 0)
    assert json_objects(["{name} is here", '{"a":1}', "{x}"]) == ([], 0)


@pytest.mark.attack("input", "init: a few answers are broken JSON")
def test_broken_answers_are_counted_and_do_not_hide_the_schema(happened: Happened) -> None:
    bad = [
        '{"a":1,"a":2}',
        '{"a":NaN}',
        '{"a":"\\ud800"}',
        '{"a":1e999}',
        '{"a":' + "9" * 200_000 + "}",
        '{"a":' * 5000,
    ]
    values, broken = json_objects(['{"a":1}'] * 10 + bad)
    assert (len(values), broken) == (10, len(bad))
    assert infer_schema(values)["properties"] == {"a": {"type": "integer"}}
    happened("counted, the schema is that of the sound ones", len(bad))
