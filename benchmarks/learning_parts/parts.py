"""The parts of the table: each measures or looks up its figures and returns its lines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import shared_cores
from engine_parts.report import Line
from learning_parts.demo import demo
from learning_parts.kept import Figures
from learning_parts.memory import memory
from learning_parts.ours import Bench, defaults, project, trained
from learning_parts.peers import RECIPES, peer
from tasks import Task
from tunesmith.evaluation.stats.statistics import interval

SHORT_TASKS = ("music", "banking77", "wording")  # of three kinds, with short rows: peers are slow
QUALITY_ROWS = 300
BUDGETS = (15, 30, 60, 120, 240, 480, 960)  # seconds: ours is trained with each until it reaches the peers' scores
FEW = {100: "100 rows", 1000: "1,000 rows"}
TRL_RATES = (2e-4, 6e-4, 2e-3)  # the documented one, and two higher ones: LoRA learns little in few steps otherwise
INIT_ROWS = 8000
SNIPS_BUDGET = "80m"
NOT_YET = "see below"


def init(bench: Bench) -> list[Line]:
    """A project that `init` makes of 8,000 rows of SNIPS: 15 minutes and ten times that, from what init gave before."""
    what, wanted = "init on 8,000 rows: share of the way to 10x the time", ">= 67%"
    if "snips" not in bench.tasks:
        return [Line(what, lacks="the corpus is missing")]
    task = bench.tasks["snips"]
    rows = task.split(INIT_ROWS, held=0).train
    found: dict[str, Figures | None] = {}
    for name, train, constrain in (
        ("before", {"method": "lora", "rank": 16, "epochs": 1, "rows": 3000}, False),
        ("15 min", {"budget": "15m"}, True),
        ("150 min", {"budget": "150m"}, True),
    ):

        def change(settings: dict[str, Any], train: Any = train, constrain: bool = constrain) -> None:
            tuned = settings["candidates"]["tuned"]
            tuned["train"] = train if "epochs" in train else {**tuned["train"], **train}
            if not constrain:
                tuned.pop("constrain", None)

        stated = {"task": task.digest, "rows": len(rows), "train": train, "constrain": constrain}
        minutes = {"before": 20.0, "15 min": 20.0, "150 min": 155.0}[name]
        found[name] = project(bench, f"init {name}", rows, change, {**stated, "minutes": minutes})
    before, now, later = (found[name] for name in ("before", "15 min", "150 min"))
    if now is None:
        return [Line(what, wanted=wanted, lacks=NOT_YET)]
    ours = _percent(now)
    if before is None or later is None:
        return [Line(what, ours, "10x the time", _percent(later) if later else "-", wanted=wanted, lacks=NOT_YET)]
    share = (now["mean"] - before["mean"]) / max(1e-9, later["mean"] - before["mean"])
    against = f"10x the time; before: {before['mean']:.1%}"
    return [Line(what, ours, against, _percent(later), shown=f"{share:.0%}", wanted=wanted, reached=share >= 2 / 3)]


def snips(bench: Bench) -> list[Line]:
    """Whole frames of SNIPS' 700 requests; what is chosen is chosen on held-out training rows."""
    what, wanted = f"SNIPS, whole frames of 700, {SNIPS_BUDGET}", ">= 92%"
    if "snips" not in bench.tasks:
        return [Line(what, lacks="the corpus is missing")]
    task = bench.tasks["snips"]
    found = trained(bench, "snips frames", task, task.split(len(task.rows)), defaults(SNIPS_BUDGET))
    if found is None:
        return [Line(what, against="encoders", peer="93.0 to 93.6%", wanted=wanted, lacks=NOT_YET)]
    reached = found["score"] >= 0.92
    return [Line(what, _mean(found["scores"]), "encoders", "93.0 to 93.6%", wanted=wanted, reached=reached)]


def quality(bench: Bench) -> list[Line]:
    """Minutes, validation included, until the score that each peer reaches with its documented recipe."""
    return [_time_to(bench, who, name, task) for who in RECIPES for name, task in _tasks(bench, SHORT_TASKS)]


def _time_to(bench: Bench, who: str, name: str, task: Task) -> Line:
    """The line of one peer and one task."""
    split = task.split(QUALITY_ROWS)
    what = f"time to {who}'s score, {name}, {len(split.train)} rows: minutes"
    theirs = peer(bench, who, f"{who} {name} {QUALITY_ROWS}", task, split)
    if theirs is None:
        return Line(what, against=who, goal=0.2, most=True, lacks=NOT_YET)
    told = f"{theirs['seconds'] / 60:.1f} ({theirs['score']:.1%})"
    best = None
    for budget in BUDGETS:
        if budget > theirs["seconds"]:
            break
        ours = trained(bench, f"ours {name} {QUALITY_ROWS} in {budget} s", task, split, defaults(budget))
        if ours is None:
            return Line(what, against=who, peer=told, goal=0.2, most=True, lacks=NOT_YET)
        if "refused" in ours:
            continue
        best = max((ours, *([best] if best else [])), key=lambda each: each["score"])
        if ours["score"] >= theirs["score"]:
            ratio = max(ours[key] / theirs[key] for key in ("seconds", "cpu_seconds"))
            mine = f"{ours['seconds'] / 60:.1f} ({ours['score']:.1%})"
            return Line(what, mine, who, told, ratio, 0.2, most=True)
    mine = f"{best['score']:.1%} at most" if best else "-"
    return Line(what, mine, who, told, wanted="<= 0.2x", reached=False)


def few(bench: Bench) -> list[Line]:
    """Mean score over three tasks from few rows: ours with defaults, TRL with the best of three rates."""
    lines = []
    for rows, told in FEW.items():
        what = f"learning from {told}: mean score of {', '.join(SHORT_TASKS)}"
        pairs: list[tuple[Figures, Figures]] = []
        for name, task in _tasks(bench, SHORT_TASKS):
            split = task.split(rows)
            ours = trained(bench, f"ours {name} {rows}", task, split, defaults("15m"))
            theirs = [
                peer(bench, "TRL", f"TRL {name} {rows} rate {rate:g}", task, split, rate=rate) for rate in TRL_RATES
            ]
            known = [each for each in theirs if each is not None]
            if ours is not None and len(known) == len(TRL_RATES):
                pairs.append((ours, max(known, key=lambda each: each["held"])))
        if len(pairs) < len(SHORT_TASKS):
            lines.append(Line(what, against="TRL, best of three rates", wanted=">= TRL's", lacks=NOT_YET))
            continue
        mine, other = (statistics.fmean(pair[place]["score"] for pair in pairs) for place in (0, 1))
        spread = _spread([np.subtract(ours["scores"], theirs["scores"]) for ours, theirs in pairs])
        lines.append(
            Line(
                what,
                f"{mine:.1%}",
                "TRL, best of three rates",
                f"{other:.1%}",
                shown=f"{100 * (mine - other):+.1f} ± {100 * spread:.1f}",
                wanted=">= TRL's",
                reached=mine >= other,
            )
        )
    return lines


def _tasks(bench: Bench, names: Sequence[str]) -> Iterator[tuple[str, Task]]:
    for name in names:
        if name in bench.tasks:
            yield name, bench.tasks[name]


def _percent(found: Figures) -> str:
    return f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}], n {found['n']}"


def _mean(scores: Sequence[float]) -> str:
    """A mean with its 95% interval."""
    found = interval(np.array(scores), [str(place) for place in range(len(scores))], confidence=0.95, seed=0)
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _spread(differences: Sequence[Any]) -> float:
    """Half of a 95% interval of the mean over tasks of mean differences: the noise of the test requests alone."""
    variance = sum(float(np.var(each)) / len(each) for each in differences)
    return 1.96 * variance**0.5 / len(differences)


def shared(bench: Bench) -> list[Line]:
    """Two trainings at once, as a share of what one alone gets done. Nothing else should be running."""
    what, wanted = "two trainings at once, share of one alone's examples/s", ">= 85%"

    def measure() -> Figures:
        alone, both = (sum(shared_cores.at_once("training", None, count, 20.0)) for count in (1, 2))
        return {"alone": round(alone, 2), "both": round(both, 2)}

    found = bench.kept.figures("two trainings at once", {"seconds": 20}, 3, measure)
    if found is None:
        return [Line(what, wanted=wanted, lacks=NOT_YET)]
    share, told = found["both"] / found["alone"], f"{found['both']:.1f} of {found['alone']:.1f}"
    return [Line(what, told, shown=f"{share:.0%}", wanted=wanted, reached=share >= 0.85)]


PARTS: Mapping[str, Callable[[Bench], list[Line]]] = {
    "demo": demo,
    "init": init,
    "snips": snips,
    "quality": quality,
    "few": few,
    "memory": memory,
    "shared": shared,
}
