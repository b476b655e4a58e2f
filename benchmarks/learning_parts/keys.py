"""What the order of keys in JSON answers does: in the rows that are learned, and in the constraint of decoding.

Rows of SNIPS with keys in the order in which the request mentions the values, and the same rows with keys in the
schema's order. No field is held to words of the request, so that the order is all that differs.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_parts.report import Line
from leakage import Row
from learning_parts.kept import Figures
from learning_parts.ours import Bench, stated_settings
from learning_parts.shown import NOT_YET, difference, mean_of
from task_training import answers, scores, train_task
from tasks import Task
from tunesmith.core.messages import Message
from tunesmith.data.formats.key_order import in_request_order
from tunesmith.engines.protocol import Generation
from tunesmith.training.settings import TrainSettings

ROWS = 900
TRAIN: Mapping[str, Any] = {
    "method": "lora", "rank": 16, "learning_rate": 1e-3, "b_rate": 1.0, "epochs": 3, "validations": 1,
    "validate_by": "loss",
}  # fmt: skip
REQUEST, SCHEMA = "the request's order", "the schema's order"


def keys(bench: Bench) -> list[Line]:
    """A line for the order in the rows, and one for the constraint's."""
    orders = f"SNIPS, {ROWS} rows, 3 epochs: keys of the rows in {REQUEST}"
    holds = f"SNIPS, {ROWS} rows, 3 epochs: constraint that lets keys come in any order"
    if "snips" not in bench.tasks:
        return [Line(what, lacks="the corpus is missing") for what in (orders, holds)]
    found = {order: _measured(bench, order) for order in (REQUEST, SCHEMA)}
    lines = []
    for what, other, order, hold in ((orders, SCHEMA, SCHEMA, "any"), (holds, SCHEMA, REQUEST, "schema")):
        usual, changed = found[REQUEST], found[order]
        if usual is None or changed is None:
            lines.append(Line(what, against=other, lacks=NOT_YET))
            continue
        one, two = usual["any"], changed[hold]
        lines.append(Line(what, mean_of(one), other, mean_of(two), shown=difference([(one, two)])))
    return lines


def _measured(bench: Bench, order: str) -> Figures | None:
    """Scores of each test request: held to the schema with keys in any order, and in the schema's."""
    task = replace(bench.tasks["snips"], constrain=True)
    split = task.split(ROWS)
    split = split._replace(train=tuple(ordered(task, row, order) for row in split.train))
    settings = TrainSettings.model_validate(TRAIN)
    stated = {"task": task.digest, "rows": ROWS, "order": order, "train": stated_settings(settings)}

    def measure() -> Figures:
        work = bench.work / ("keys-request" if order == REQUEST else "keys-schema")
        adapter = train_task(bench.loaded, task, split, settings, work).folder
        given = {"any": answers(bench.loaded, task, task.test, adapter)}
        given["schema"] = _in_schema_order(bench, task, task.test, adapter)
        shutil.rmtree(work)
        found = {hold: [round(each, 3) for each in scores(task, task.test, texts)] for hold, texts in given.items()}
        return {**found, "means": {hold: round(statistics.fmean(each), 4) for hold, each in found.items()}}

    return bench.kept.figures(f"keys in {order}", stated, 12, measure)


def ordered(task: Task, row: Row, order: str) -> Row:
    """A row with the keys of its answer in an order."""
    request, answer = row
    if order == REQUEST:
        turns = (Message(role="user", content=request), Message(role="assistant", content=answer))
        return request, in_request_order(turns)[-1].content
    assert task.schema is not None
    return request, json.dumps(_by_schema(json.loads(answer), task.schema), ensure_ascii=False)


def _by_schema(value: Any, schema: Mapping[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    return {key: _by_schema(value[key], known[key]) for key in known if key in value}


def _in_schema_order(bench: Bench, task: Task, rows: Sequence[Row], adapter: Path) -> list[str]:
    """Greedy answers, held to the schema as llguidance does it by itself: with keys in the schema's order."""
    engine, schema = bench.loaded.model.engine(), json.dumps(task.schema, ensure_ascii=False)
    engine.load_adapter("answering", adapter)
    asked = [Generation(task.messages(request), max_tokens=task.max_tokens, schema=schema) for request, _ in rows]
    return [one.text for one in engine.generate(asked, "answering")]
