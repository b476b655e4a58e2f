"""What a new project's schema says of the rows' numbers, and how its data build spells their answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import jsonschema
import pytest

from tests.tiny import write_model
from tunesmith.api import Project
from tunesmith.pipeline.context import PipelineContext
from tunesmith.services.inferred_schema import infer_schema
from tunesmith.services.new_project import make_project


@pytest.mark.parametrize(
    ("value", "ends"),
    [
        (lambda n: 15 + n % 16, (0, 45)),
        (lambda n: -5 + n % 16, (-20, 25)),
        (lambda n: 15.5 + n % 16 / 2, (0, 31)),
        (lambda n: 1000 + n, None),
        (lambda n: (15 + n % 16) * 1e-9, None),
    ],
    ids=["temperatures", "below-zero", "halves", "orders", "exponents"],
)
def test_a_range_that_is_seen_again_and_again_gets_a_margin(
    value: Callable[[int], float], ends: tuple[int, int] | None
) -> None:
    values = [{"n": value(n)} for n in range(1000)]
    found = infer_schema(values)["properties"]["n"]
    assert (found.get("minimum"), found.get("maximum")) == (ends or (None, None))
    jsonschema.validate(values[-1]["n"], found)


def test_the_build_writes_answers_as_a_constraint_allows_them(tmp_path: Path) -> None:
    """json.dumps writes the letters of a name as escapes, which decoding under a schema does not."""
    write_model(tmp_path / "model")
    verbs = ("call", "ring", "phone", "meet", "wake", "ask", "remind", "text")
    openings = ("please", "later on", "do", "kindly", "today")
    found = [
        {
            "prompt": f"{opening} {verb} her {n}",
            "completion": json.dumps({"n": f"Ren\u00e9e {n}"}, indent=n % 2 or None),
        }
        for n, (opening, verb) in enumerate(product(openings, verbs))
    ]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    made = make_project(tmp_path / "p", data=data, licence="CC0-1.0", base=str(tmp_path / "model"))
    assert made.respelled == 40
    file = tmp_path / "p" / "tunesmith.yaml"
    for held, example in ((True, '{"n": "Ren\u00e9e'), (False, "\\u00e9")):
        dataset = PipelineContext(Project.load(tmp_path / "p")).dataset
        assert all(example in row.answer for row in dataset.examples("train"))
        assert dataset.record.body.get("respelled") == (40 if held else None)
        file.write_text(re.sub(r"constrain: true", "constrain: false", file.read_text()))
