"""What is learned from few rows, compared with the best of three rates of TRL's recipe."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping

from engine_parts.report import Line
from learning_parts.kept import Figures
from learning_parts.ours import SHORT_TASKS, Bench, defaults, short_tasks, trained
from learning_parts.peers import peer, stand_in
from learning_parts.shown import NOT_YET, difference
from tasks import Split, Task

RATES = (2e-4, 6e-4, 2e-3)  # the documented one, and two higher ones: LoRA learns little in few steps otherwise
FEW, MORE = 100, 1000
OURS, THEIRS, STAND_IN = "ours", "TRL, best of 3 rates", "TRL's recipe in our engine, no dropout, best of 3 rates"

# Figures of a task with so many rows, or None where one of them is not known.
Learned = Callable[[Bench, str, Task, Split], Figures | None]


def few(bench: Bench) -> list[Line]:
    """Ours and TRL at 100 rows, TRL's stand-in and TRL there, and ours and the stand-in at 1,000 rows."""
    return [
        _compared(bench, FEW, OURS, THEIRS, ">= TRL's"),
        _compared(bench, FEW, STAND_IN, THEIRS, None),
        _compared(bench, MORE, OURS, STAND_IN, ">= the peer's"),
    ]


def few_trl(bench: Bench) -> list[Line]:
    """The line for 1,000 rows against TRL itself, which takes hours."""
    return [_compared(bench, MORE, OURS, THEIRS, ">= TRL's")]


def _compared(bench: Bench, rows: int, one: str, other: str, wanted: str | None) -> Line:
    """The mean scores of two over all tasks. wanted: None for what has no goal."""
    who = "" if one == OURS else f", {one}"
    what = f"learning from {rows:,} rows, mean of {', '.join(SHORT_TASKS)}{who}"
    pairs = [pair for pair in _pairs(bench, rows, one, other) if pair is not None]
    if len(pairs) < len(SHORT_TASKS):
        return Line(what, against=other, wanted=wanted, lacks=NOT_YET)
    mine, theirs = (statistics.fmean(pair[place]["score"] for pair in pairs) for place in (0, 1))
    shown = difference([(ours["scores"], peers["scores"]) for ours, peers in pairs])
    reached = None if wanted is None else mine >= theirs
    return Line(what, f"{mine:.1%}", other, f"{theirs:.1%}", shown=shown, wanted=wanted, reached=reached)


def _pairs(bench: Bench, rows: int, one: str, other: str) -> Iterator[tuple[Figures, Figures] | None]:
    for name, task in short_tasks(bench):
        first, second = (_LEARNED[who](bench, f"{name} {rows}", task, task.split(rows)) for who in (one, other))
        yield None if first is None or second is None else (first, second)


def _ours(bench: Bench, name: str, task: Task, split: Split) -> Figures | None:
    return trained(bench, f"ours {name}", task, split, defaults())


def _theirs(bench: Bench, name: str, task: Task, split: Split) -> Figures | None:
    return _best([peer(bench, "TRL", f"TRL {name} rate {rate:g}", task, split, rate=rate) for rate in RATES])


def _stand_in(bench: Bench, name: str, task: Task, split: Split) -> Figures | None:
    return _best([stand_in(bench, f"TRL's recipe {name} rate {rate:g}", task, split, rate) for rate in RATES])


def _best(found: list[Figures | None]) -> Figures | None:
    """The one that the held-out rows choose."""
    known = [each for each in found if each is not None]
    return max(known, key=lambda each: each["held"]) if len(known) == len(found) else None


_LEARNED: Mapping[str, Learned] = {OURS: _ours, THEIRS: _theirs, STAND_IN: _stand_in}
