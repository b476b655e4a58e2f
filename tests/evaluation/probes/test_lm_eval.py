"""Tasks of lm-eval: what is asked of their rows, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.evaluation.probes.test_probe_items import context
from tunesmith.core.errors import UsageError
from tunesmith.evaluation.probes.harness import lm_eval_items

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'tunesmith[lm-eval]'")
WORDS = ("light", "fan", "heater", "radio", "lamp", "blind", "oven", "door")
TASK: dict[str, Any] = {
    "task": "rooms", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl", "train": "shots.jsonl"}},
    "fewshot_split": "train", "num_fewshot": 2, "description": "Answer in one word.",
    "doc_to_text": "What is in the {{room}}?", "doc_to_choice": "{{choices}}", "doc_to_target": "right",
}  # fmt: skip


def write_task(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {"room": f"room {k}", "choices": [WORDS[(k + j) % 8] for j in range(2 + k % 3)], "right": k % 2}
        for k in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / "shots.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows[:6]))
    (folder / "rooms.yaml").write_text(yaml.safe_dump({**TASK, **changes}))
    return folder


def test_the_same_rows_are_drawn_every_time_and_shots_are_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task(tmp_path / "tasks")
    items = lm_eval_items(context(rows=25, path=folder))
    assert items == lm_eval_items(context(rows=25, path=folder))
    assert len({item.group for item in items}) == 25
    assert [turn.role for turn in items[0].messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    whole = lm_eval_items(context(path=folder))
    assert [item.id for item in whole] == [f"rooms-{k}" for k in range(40)]
    for k, item in enumerate(whole):
        assert item.messages[-1].content == f"What is in the room {k}?"
        assert (item.choices[0], len(item.choices)) == (WORDS[(k + k % 2) % 8], 2 + k % 3), (
            "the right choice comes first"
        )
    with pytest.raises(UsageError, match="not a folder"):
        lm_eval_items(context(path=folder / "rooms.yaml"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    with pytest.raises(UsageError) as caught:
        lm_eval_items(context(path=folder))
    assert caught.value.fix == "pip install 'tunesmith[lm-eval]'"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"doc_to_text": "{{ room.what() }}"}, "lm-eval cannot read it"),
        ({"dataset_path": "super_glue"}, "downloads its rows"),
        ({"dataset_kwargs": {"data_files": "https://host/rows.jsonl"}}, "not a file in the task's folder"),
        ({"dataset_kwargs": {"data_files": "../rows.jsonl"}}, "not a file in the task's folder"),
        ({"dataset_kwargs": {"data_files": "rows.jsonl", "trust_remote_code": True}}, "downloads its rows"),
        ({"output_type": "generate_until"}, "multiple_choice"),
        ({"include": "other.yaml"}, "`include`"),
        ({"task": None}, "the key `task`"),
    ],
)
def test_tasks_that_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        lm_eval_items(context(path=write_task(tmp_path / "tasks", **changes)))
    assert caught.value.where.endswith("rooms.yaml")
    for text in ("doc_to_text: !function code.f\n", "a: [\n", "- a\n", ""):
        (tmp_path / "tasks" / "rooms.yaml").write_text(text)
        with pytest.raises(UsageError, match=r"rooms\.yaml"):
            lm_eval_items(context(path=tmp_path / "tasks"))
