"""Tasks of lm-eval: asked through our engine they score as through the harness's own, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.evaluation.probes.test_probe_items import context
from tests.tiny import write_model
from tunesmith.core.errors import UsageError
from tunesmith.engines.native import engine as embedded
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Question
from tunesmith.evaluation.probes.harness import lm_eval_items
from tunesmith.models.base import resolve_base
from tunesmith.store.store import Store

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


@pytest.mark.slow
@pytest.mark.long
def test_scores_are_those_of_the_harness_s_own_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    folder = write_task(tmp_path / "tasks")
    items = lm_eval_items(context(path=folder))
    # fp32, so that what differs is a mistake and not rounding.
    monkeypatch.setattr(embedded, "load_network", lambda folder: load_network(folder, torch.float32))
    base = resolve_base(Store(tmp_path / "store"), str(write_model(tmp_path / "model")), tmp_path)
    ours = NativeEngine(base).choose([Question(item.messages, item.choices) for item in items])
    # Our answers end their turn; the harness's do where a choice says so.
    ended = {
        **TASK,
        "doc_to_choice": "{{choices | map('regex_replace', '$', '<|im_end|>') | list}}",
        "fewshot_config": {"split": "train", "doc_to_choice": TASK["doc_to_choice"]},
    }
    files = {split: str(folder / name) for split, name in TASK["dataset_kwargs"]["data_files"].items()}
    task = ConfigurableTask(
        config={**ended, "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")}}
    )
    model = HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=1)
    told = simple_evaluate(model, tasks=[task], apply_chat_template=True, fewshot_as_multiturn=True, bootstrap_iters=0)
    assert told is not None
    samples = sorted(told["samples"]["rooms"], key=lambda each: each["doc_id"])
    assert len(samples) == len(items) == 40
    for sample, item, scores in zip(samples, items, ours, strict=True):
        right = sample["doc"]["right"]
        theirs = [each[0][0] for each in sample["resps"]]
        theirs = [theirs.pop(right), *theirs]
        # The harness counts the line break that opens the answer as the answer's: the same for all choices of a row.
        apart = [value - theirs[0] for value in theirs]
        assert [value - scores[0] for value in scores] == pytest.approx(apart, abs=2e-3), item.id
        assert float(scores[0] == max(scores)) == sample["acc"]
    accuracy = sum(scores[0] == max(scores) for scores in ours) / len(ours)
    assert accuracy == pytest.approx(told["results"]["rooms"]["acc,none"])
    assert 0.1 < accuracy < 0.9, "answers of both kinds"


def test_the_same_rows_are_drawn_every_time_and_shots_are_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task(tmp_path / "tasks")
    items = lm_eval_items(context(rows=25, path=folder))
    assert items == lm_eval_items(context(rows=25, path=folder))
    assert len({item.group for item in items}) == 25
    assert [turn.role for turn in items[0].messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert items[0].choices[0] in WORDS
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
