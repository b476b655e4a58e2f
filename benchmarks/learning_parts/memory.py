"""What a model keeps of its rows and forgets of the rest: at the defaults, with fewer epochs, without rehearsal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_parts.report import Line
from learning_parts.kept import Figures
from learning_parts.ours import RECIPE, Bench, defaults
from task_projects import write_project

TASK, ROWS = "home", 300
CANARIES = {"each": 20, "repeats": [1, 4], "controls": 128}
PROBES = 3  # raise it where a probe measures otherwise, or canaries are planted otherwise: earlier figures do not count
REHEARSE = {"rehearse": defaults()["rehearse"]}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "defaults": defaults(),
    "one": {"epochs": 1, **REHEARSE},
    "three": {"epochs": 3, "keep": "last", **REHEARSE},
    "ten": {"epochs": 10, "keep": "last", **REHEARSE},
    "ten without rehearsal": {"epochs": 10, "keep": "last"},
}
# Points between learning and memorising: all with the rate that falls from the first tenth of the steps on.
_FALLS = {"schedule": "wsd", "decay": 0.9, "keep": "last", "batch": 8, **REHEARSE}
TRICKED = {f"10 epochs, {trick}": trick for trick in ("dropped", "smoothed")}  # of tricks.py
FRONTIER: Mapping[str, Mapping[str, Any]] = {
    "3 epochs": {"epochs": 3, **_FALLS},
    "5 epochs": {"epochs": 5, **_FALLS},
    "rank 4, 5 epochs": {"epochs": 5, "rank": 4, **_FALLS},
    "10 epochs, lowest loss": {"epochs": 10, **_FALLS, "keep": "best", "validate_by": "loss", "validations": 10},
    "half the rate, 5 epochs": {"epochs": 5, "learning_rate": 5e-4, "b_rate": 4.0, **_FALLS},
    "weight decay 0.1, 5 epochs": {"epochs": 5, "weight_decay": 0.1, **_FALLS},
    "10 epochs": {"epochs": 10, **_FALLS},
    "rank 4, 10 epochs": {"epochs": 10, "rank": 4, **_FALLS},
    "batch 16, 5 epochs": {"epochs": 5, **_FALLS, "batch": 16},
    "batch 16, 10 epochs": {"epochs": 10, **_FALLS, "batch": 16},
    "2 epochs": {"epochs": 2, **_FALLS},
    "20 epochs": {"epochs": 20, **_FALLS},
    "a quarter of the rate, 10 epochs": {"epochs": 10, "learning_rate": 2.5e-4, "b_rate": 4.0, **_FALLS},
    "rank 1, 10 epochs": {"epochs": 10, "rank": 1, **_FALLS},
    **{name: {"epochs": 10, **_FALLS} for name in TRICKED},
}
# As the guide for engineers has them, but for overfitting (0.10 there). A canary was added once; four times is shown by
# the report.
GATES: Mapping[str, Mapping[str, Any]] = {
    "canaries": {"probe": "canaries", "at_most": 3.0, "repeats": 1},
    "membership": {"probe": "membership", "at_most": 0.65},
    "extraction": {"probe": "extraction", "at_most": 0.10},
    "overfitting": {"probe": "overfitting", "at_most": 0.35},
    "general_text": {"probe": "general_text", "at_most": 0.10},
    "forgetting": {"suite": "general", "drop_at_most": 0.10},
}
UNITS = {
    "canaries": "bits of exposure, added once",
    "membership": "AUC",
    "extraction": "share of rows",
    "overfitting": "nats a token",
    "general_text": "nats a token",
    "forgetting": "share of questions",
}


def memory(bench: Bench) -> list[Line]:
    """A line for each probe, and what the recipes score."""
    if TASK not in bench.tasks:
        return [Line("memorisation and forgetting", lacks=f"the task {TASK} is missing")]
    found = {name: _measured(bench, name, train) for name, train in RECIPES.items()}
    usual, others = found["defaults"], {name: each for name, each in found.items() if name != "defaults"}
    against, lines = f"epochs: {'; '.join(others)}", []
    for probe in GATES:
        what = f"{probe} at the defaults ({UNITS[probe]})"
        bound = next(value for key, value in GATES[probe].items() if key.endswith("at_most"))
        if usual is None:
            lines.append(Line(what, against=against, wanted=f"<= {bound:g}", lacks="see below"))
            continue
        told = "; ".join(_told(each, probe, ends=False) for each in others.values())
        reached = usual["gates"][probe]["outcome"] == "pass"
        lines.append(Line(what, _told(usual, probe), against, told, wanted=f"<= {bound:g}", reached=reached))
    if usual is not None:
        told = "; ".join(f"{each['mean']:.1%}" if each else "-" for each in others.values())
        lines.append(Line(f"exactly right with these recipes, {ROWS} rows", f"{usual['mean']:.1%}", against, told))
    return lines


def frontier(bench: Bench) -> list[Line]:
    """A line for each point: the score, and what it costs in bits."""
    if TASK not in bench.tasks:
        return [Line("learning and memorising", lacks=f"the task {TASK} is missing")]
    gates = {name: GATES[name] for name in ("canaries", "membership", "overfitting")}
    lines = []
    for name, train in FRONTIER.items():
        what = f"{ROWS} rows, {name}: exactly right; canaries, membership, overfitting"
        found = _measured(bench, name, train, gates)
        if found is None:
            lines.append(Line(what, lacks="see below"))
            continue
        told = "; ".join(_told(found, probe) for probe in gates)
        lines.append(Line(what, f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}]", "probes", told))
    return lines


def _told(found: Figures | None, probe: str, *, ends: bool = True) -> str:
    """A probe's value and its gate's outcome where that is not a pass. ends: with the interval."""
    gate = found["gates"][probe] if found else None
    if gate is None or gate["value"] is None:
        return "-"
    outcome = "" if gate["outcome"] == "pass" else f" {gate['outcome']}"
    interval = f" [{gate['low']:.2f}, {gate['high']:.2f}]" if ends else ""
    return f"{gate['value']:.2f}{interval}{outcome}"


def _measured(
    bench: Bench, name: str, train: Mapping[str, Any], gates: Mapping[str, Mapping[str, Any]] = GATES
) -> Figures | None:
    """The gates of a candidate that was trained with canaries among its rows, and its score."""
    task = bench.tasks[TASK]
    stated = {"task": task.digest, "rows": ROWS, "train": dict(train), "canaries": CANARIES, "gates": dict(gates),
              "recipe": RECIPE, "probes": PROBES}  # fmt: skip
    trick = TRICKED.get(name)
    if trick:
        stated["trick"] = trick
    folder = bench.work / f"memory-{name.replace(' ', '-')}"

    def run(*arguments: str, by: Sequence[str] = ("-m", "tunesmith")) -> dict[str, Any]:
        command = [sys.executable, *by, *arguments, "-C", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3, 4):
            raise SystemExit(f"tunesmith {' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout))

    def measure() -> Figures:
        if not (folder / "tunesmith.yaml").exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_project(folder, task, ROWS, {**train, "canaries": CANARIES})
            settings = json.loads((folder / "tunesmith.yaml").read_text(encoding="utf-8"))
            settings["gates"] = dict(gates)
            (folder / "tunesmith.yaml").write_text(json.dumps(settings), encoding="utf-8")
        if trick:
            run("train", "tuned", by=(str(Path(__file__).parents[1] / "tricks.py"), trick))
        judged = run("gate", "tuned")["gates"]
        evaluation = run("evaluate", "tuned")
        training = run("train", "tuned")
        shutil.rmtree(folder)
        kept = ("outcome", "value", "low", "high")
        score = evaluation["candidates"]["tuned"][task.metric]
        return {
            **{key: round(score[key], 4) for key in ("mean", "low", "high")},
            "n": evaluation["n"],
            "epochs": training["epochs"],
            "seconds": training["seconds"],
            "gates": {gate["name"]: {key: gate[key] for key in kept} for gate in judged},
        }

    return bench.kept.figures(f"memory {name}", stated, 20 if name == "defaults" else 10, measure)
