"""A project with enough rows for a forecast, on a tiny random base."""

import json
from pathlib import Path
from typing import Any

from tests.tiny_project import rows, settings, write_project
from tunesmith.api import Project

SCORER = """
def score(answer, reference, request):
    return VALUE
"""


def write_large(folder: Path, *, value: str | None = None, copies: int = 2, **changes: Any) -> Project:
    """A project of a few hundred rows. value: what its scorer says of every answer."""
    told = settings()
    told["data"] = {**told["data"], "split": {"validation": 0.1, "test": 0.2, "group_by": "template"}}  # type: ignore[dict-item]
    tuned = {"prompt": "prompt.txt", "train": {"rank": 2, "epochs": 2}, "max_tokens": 8}
    told["candidates"] = {
        "nearest": {"method": "nearest"},
        "plain": {"prompt": "prompt.txt", "max_tokens": 8},
        "tuned": tuned,
    }
    told["gates"] = {"lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.05}}
    told["prices"] = {"machine_hour": 3.6}
    if value is not None:
        (folder / "scorer.py").parent.mkdir(parents=True, exist_ok=True)
        (folder / "scorer.py").write_text(SCORER.replace("VALUE", value))
        told["task"] = {"scorers": [{"name": "own", "function": "scorer.py:score"}]}
        told["gates"] = {}
    write_project(folder, **{**told, **changes})
    more = [
        {"messages": [{"role": "user", "content": f"{word} {row['messages'][0]['content']}"}, row["messages"][1]],
         "template": f"{word} {row['template']}"}
        for word in ("please", "now", "again")[:copies]
        for row in rows()
    ]  # fmt: skip
    with (folder / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in more)
    return Project.load(folder)
