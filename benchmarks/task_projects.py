"""Writes a task (tasks.py) as a project for the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks import BASE, Task


def write_project(
    folder: Path, task: Task, rows: int, train: Mapping[str, Any], *, seed: int = 0, candidates: Mapping[str, Any] = {}
) -> Path:
    """Write a project for a task; returns its folder. train: the settings of the candidate `tuned`.

    The project holds the rows of `task.split(rows)`: those to choose by come in addition and make its validation split,
    roughly, since the build draws groups; the task's test requests are its test split. candidates: further ones.
    """
    split = task.split(rows, seed)
    folder.mkdir(parents=True)
    groups = dict(zip(task.rows, task.groups, strict=True))
    parts = {
        "rows": [{"prompt": row[0], "completion": row[1], "group": groups[row]} for row in (*split.train, *split.held)],
        "test": [
            {"prompt": row[0], "completion": row[1], "group": f"test {place}"} for place, row in enumerate(task.test)
        ],
    }
    for part, lines in parts.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    (folder / "prompt.txt").write_text(task.prompt + "\n", encoding="utf-8")
    answer = {"prompt": "prompt.txt", "max_tokens": task.max_tokens}
    scorers = [task.metric]
    if task.schema is not None:
        (folder / "answer.schema.json").write_text(json.dumps(task.schema), encoding="utf-8")
        answer["constrain"] = {"copy": list(task.constrain)} if isinstance(task.constrain, tuple) else task.constrain
        scorers.append("json_valid")
    share = round(len(split.held) / (len(split.train) + len(split.held)), 4)
    settings = {
        "name": task.name,
        "base": BASE,
        "data": {
            "sources": [
                {"path": "rows.jsonl", "licence": task.licence},
                {"path": "test.jsonl", "licence": task.licence, "split": "test"},
            ],
            "split": {"validation": share, "test": 0, "group_by": "group"},
            "privacy": {"action": "report"},
            "licences": {"share_alike": True},
        },
        "task": ({"schema": "answer.schema.json"} if task.schema is not None else {}) | {"scorers": scorers},
        "candidates": {**candidates, "tuned": {**answer, "train": dict(train)}},
    }
    (folder / "tunesmith.yaml").write_text(json.dumps(settings, indent=1), encoding="utf-8")  # JSON is YAML
    return folder
