"""The parts of the table: each measures or looks up its figures and returns its lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import shared_cores
from engine_parts.report import Line
from learning_parts.demo import demo
from learning_parts.few import few, few_trl
from learning_parts.kept import Figures
from learning_parts.keys import keys
from learning_parts.memory import frontier, memory
from learning_parts.ours import RECIPE, Bench, defaults, project, short_tasks, trained
from learning_parts.peers import RECIPES, peer
from learning_parts.shown import NOT_YET, mean_of
from tasks import Task, snips_as_published

QUALITY_ROWS = 300
BUDGETS = (15, 30, 60, 120, 240, 480, 960)  # seconds: ours is trained with each until it reaches the peers' scores
INIT_ROWS = 8000
SNIPS_BUDGET = "80m"


def init(bench: Bench) -> list[Line]:
    """A project that `init` makes of 8,000 rows of SNIPS: 15 minutes and ten times that, from what init gave before."""
    what, wanted = "init on 8,000 rows: share of the way to 10x the time", ">= 67%"
    if "snips" not in bench.tasks:
        return [Line(what, lacks="the corpus is missing")]
    task = bench.tasks["snips"]
    rows = task.split(INIT_ROWS, held=0).train
    found: dict[str, Figures | None] = {}
    for name, train, constrain in (
        ("before", {"method": "lora", "rank": 16, "b_rate": 1.0, "epochs": 1, "rows": 3000}, False),
        ("15 min", defaults("15m"), True),
        ("150 min", defaults("150m"), True),
    ):

        def change(settings: dict[str, Any], train: Any = train, constrain: bool = constrain) -> None:
            tuned = settings["candidates"]["tuned"]
            tuned["train"] = train if "epochs" in train else {**tuned["train"], **train}
            if not constrain:
                tuned.pop("constrain", None)

        stated = {"task": task.digest, "rows": len(rows), "train": train, "constrain": constrain, "recipe": RECIPE}
        minutes = {"before": 20.0, "15 min": 20.0, "150 min": 155.0}[name]
        found[name] = project(bench, f"init {name}", rows, change, {**stated, "minutes": minutes})
    before, now, later = (found[name] for name in ("before", "15 min", "150 min"))
    if now is None:
        return [Line(what, wanted=wanted, lacks=NOT_YET)]
    ours, against = _percent(now), f"10x the time; before: {before['mean']:.1%}" if before else "10x the time"
    if before is None:
        return [Line(what, ours, against, _percent(later) if later else "-", wanted=wanted, lacks=NOT_YET)]
    # Ten times the time reaches 100% at most, so the share may be enough whatever it reaches.
    share = (now["mean"] - before["mean"]) / max(1e-9, (later["mean"] if later else 1.0) - before["mean"])
    lacks = NOT_YET if later is None and share < 2 / 3 else None
    theirs, shown = (_percent(later), f"{share:.0%}") if later else ("at most 100%", f"at least {share:.0%}")
    return [Line(what, ours, against, theirs, shown=shown, wanted=wanted, lacks=lacks, reached=share >= 2 / 3)]


def snips(bench: Bench) -> list[Line]:
    """Whole frames of SNIPS' 700 requests; what is chosen is chosen on held-out training rows.

    All published rows are trained on, as encoders are; the second line has the requests whose template no row has.
    """
    what, wanted = f"SNIPS, whole frames of 700, {SNIPS_BUDGET}", ">= 92%"
    if "snips" not in bench.tasks:
        return [Line(what, lacks="the corpus is missing")]
    task, unseen = snips_as_published(bench.folder)
    found = trained(bench, "snips frames", task, task.split(len(task.rows)), defaults(SNIPS_BUDGET))
    if found is None:
        return [Line(what, against="encoders", peer="93.0 to 93.6%", wanted=wanted, lacks=NOT_YET)]
    new = [each for each, one in zip(found["scores"], unseen, strict=True) if one]
    return [
        Line(
            what, mean_of(found["scores"]), "encoders", "93.0 to 93.6%", wanted=wanted, reached=found["score"] >= 0.92
        ),
        Line(f"the {len(new)} of them whose template was not trained on", mean_of(new)),
    ]


def quality(bench: Bench) -> list[Line]:
    """Minutes, validation included, until the score that each peer reaches with its documented recipe."""
    return [_time_to(bench, who, name, task) for who in RECIPES for name, task in short_tasks(bench)]


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


def _percent(found: Figures) -> str:
    return f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}], n {found['n']}"


def shared(bench: Bench) -> list[Line]:
    """Two processes that compute at once, as a share of what one alone gets done. Nothing else should be running."""
    lines, seconds = [], 20.0
    for what, kinds in {
        "two trainings at once": ("training", "training"),
        "a training while a server decodes": ("training", "decoding"),
    }.items():

        def measure(kinds: tuple[str, ...] = kinds) -> Figures:
            return shared_cores.compared(kinds, None, seconds)._asdict()

        found = bench.kept.figures(what, {"seconds": seconds, "kinds": kinds}, 3, measure)
        told, wanted = f"{what}: together, share of one alone", ">= 85%"
        if found is None:
            lines.append(Line(told, wanted=wanted, lacks=NOT_YET))
            continue
        share = shared_cores.Compared(**found).share
        ours = " and ".join(
            f"{together:.1f} of {alone:.1f} {shared_cores.WORK[kind]}"
            for kind, alone, together in zip(kinds, found["alone"], found["together"], strict=True)
        )
        lines.append(Line(told, ours, shown=f"{share:.0%}", wanted=wanted, reached=share >= 0.85))
    return lines


PARTS: Mapping[str, Callable[[Bench], list[Line]]] = {
    "demo": demo,
    "init": init,
    "snips": snips,
    "keys": keys,
    "quality": quality,
    "few": few,
    "memory": memory,
    "frontier": frontier,
    "shared": shared,
    "few-trl": few_trl,
}
