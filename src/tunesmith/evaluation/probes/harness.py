"""The lm_eval probe: multiple-choice tasks of the Language Model Evaluation Harness, asked as chat.

lm-eval reads the task: rows, few-shot examples, templates and right choices. The project's engine answers with the
rendering that serving uses, so a choice's log-probability includes the end of the turn, which lm-eval leaves out.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import Fields, parse_json
from tunesmith.core.reading.strict_yaml import read_yaml
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.core.text.wording import percent
from tunesmith.evaluation.metrics.declared import Scoring
from tunesmith.evaluation.probes import suites
from tunesmith.evaluation.probes.measuring import Item
from tunesmith.evaluation.probes.suites import Case, ProbeContext, Shown, Suite
from tunesmith.evaluation.stats.statistics import GAPS

_EXTRA = "pip install 'tunesmith[lm-eval]'"
_FILES = ("json", "csv", "parquet")  # read from files; `datasets` downloads any other dataset_path
_CLOSED = ("include", "group", "custom_dataset", "gen_prefix", "doc_to_image", "doc_to_audio", "unsafe_code")
_SEED = 1234  # lm-eval's own seed for few-shot examples


def lm_eval_items(context: ProbeContext) -> list[Item]:
    """At most context.rows items of each task in the folder context.path, the right choice first.

    Each .yaml file is a task. Raises UsageError for a task that is not multiple choice, reads files outside the folder
    or contains code, and where lm-eval is not installed.
    """
    folder = context.needed_path
    if not folder.is_dir():
        raise UsageError("not a folder of tasks", where=str(folder), fix="name the folder that holds TASK.yaml")
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UsageError("the folder has no .yaml file", where=str(folder), fix="put lm-eval tasks there")
    with scratch_folder() as cache:
        return [item for file in files for item in _items(file, _settings(file), cache, context.rows)]


def _settings(file: Path) -> dict[str, Any]:
    """A task's settings with absolute paths of its data files."""
    read = read_yaml(read_text_file(file, "the task"), str(file))
    if not isinstance(read, Mapping) or not isinstance(read.get("task"), str):
        raise UsageError("a task needs keys and values, and the key `task`", where=str(file))
    if read.get("output_type") != "multiple_choice":
        raise UsageError("only tasks with `output_type: multiple_choice` are supported", where=str(file))
    if closed := [key for key in _CLOSED if read.get(key)]:
        raise UsageError(
            f"tasks with `{closed[0]}` are not supported", where=str(file), fix="write the task out in full"
        )
    named = read.get("dataset_kwargs")
    if read.get("dataset_path") not in _FILES or not isinstance(named, Mapping) or set(named) != {"data_files"}:
        raise UsageError(
            "the task downloads its rows, and only local files are supported",
            where=str(file),
            fix=f"set dataset_path to one of {', '.join(_FILES)}, and dataset_kwargs to data_files beside the task",
        )
    whole = _beside(named["data_files"], file)
    measured = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    return {**read, "dataset_kwargs": {"data_files": whole}, "metric_list": measured}


def _beside(named: Any, file: Path) -> Any:
    """data_files as absolute paths. All must be in the task's folder, which the digest of the probe's path covers."""
    if isinstance(named, Mapping):
        return {split: _beside(each, file) for split, each in named.items()}
    if isinstance(named, list):
        return [_beside(each, file) for each in named]
    path = file.parent / str(named)
    if not isinstance(named, str) or Path(named).name != named or not path.is_file():
        raise UsageError(f"data_files names {named!r}, which is not a file in the task's folder", where=str(file))
    return str(path.absolute())


def _items(file: Path, settings: dict[str, Any], cache: Path, many: int) -> list[Item]:
    try:
        from lm_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise UsageError(f"tasks of lm-eval need {error.name}", where="gates, lm_eval", fix=_EXTRA) from error
    settings["dataset_kwargs"]["cache_dir"] = str(cache)
    try:
        with redirect_stderr(io.StringIO()):  # it draws progress bars
            task = ConfigurableTask(config=settings)
            if task.multiple_input:
                raise UsageError("tasks with several inputs per row are not supported", where=str(file))
            task.set_fewshot_seed(_SEED)
            count = len(task.eval_docs)
            chosen = sorted(random.Random(0).sample(range(count), many)) if count > many else None
            task.build_all_requests(
                samples=chosen, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=_as_turns
            )
        by_row: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_row.setdefault(instance.doc_id, []).append(instance)
        return [
            _item(settings["task"], row, instances, task.doc_to_target(instances[0].doc), str(file))
            for row, instances in sorted(by_row.items())
        ]
    except UsageError:
        raise
    except Exception as error:  # the task's templates may raise anything
        raise UsageError(f"lm-eval cannot read it: {type(error).__name__}: {error}", where=str(file)) from error


def _item(task: str, row: int, instances: Sequence[Any], right: Any, where: str) -> Item:
    texts = [instance.args[1] for instance in sorted(instances, key=lambda each: each.idx)]
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(texts) or len(texts) < 2:
        raise UsageError(f"row {row} has {len(texts)} choices, and {right!r} is not the number of one", where=where)
    turns = tuple(Message.model_validate(turn) for turn in parse_json(instances[0].args[0]))
    others = (text for place, text in enumerate(texts) if place != right)
    name = f"{task}-{row}"
    return Item(id=name, group=name, arm=task, messages=turns, choices=(texts[right], *others))


def _as_turns(history: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
    """The turns as JSON, in place of rendered text: the engine renders them later."""
    return json.dumps([{"role": turn["role"], "content": turn["content"]} for turn in history])


def _likeliest(item: Item, line: Fields, _scoring: Scoring) -> float:
    scores = suites.likelihoods(item, line)
    return float(scores[0] == max(scores))


def _lm_eval(case: Case) -> Shown:
    name, shown, extra = suites.worst_change(case, rise=False, ends=GAPS)
    before, after = (percent(extra[side][name]) for side in ("before", "after"))
    many = len(case.measured)
    sentence = (
        f"accuracy on {name} of lm-eval went from {before} to {after}, "
        f"a fall of {suites.in_points(shown)} points, the worst of {many} {'task' if many == 1 else 'tasks'}"
    )
    return Shown(shown, sentence, extra)


SUITES = {"lm_eval": Suite(lm_eval_items, _likeliest, _lm_eval, before=True, own=False)}
