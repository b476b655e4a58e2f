"""The bases of an evaluation side by side, and the smallest whose best candidate is not worse than any other."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.text.wording import percent, points
from tunesmith.evaluation.report.approach_ladder import CONTROL, approach_of
from tunesmith.evaluation.report.evidence import ComparedBases, MeasuredBase
from tunesmith.evaluation.scores import Columns, difference
from tunesmith.evaluation.stats.statistics import Level
from tunesmith.records.candidate import BaseBody
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.records.training import TrainingBody
from tunesmith.store.store import Store

MARGIN: Final = 0.02  # of the primary metric: within it a base counts as not worse


def compared_bases(store: Store, body: EvaluationBody, columns: Columns) -> ComparedBases | None:
    """The bases that candidates answered with, the smallest first; None for fewer than two.

    A base is not worse where the whole interval of its best candidate's difference to the best candidate of all bases,
    on the same rows, is above -MARGIN. Controls do not count.
    """
    by_base: defaultdict[str, dict[str, Candidate]] = defaultdict(dict)
    for name, stated in sorted(body.candidates.items()):
        candidate = load_candidate(store, stated.candidate)
        if candidate.asks_base and approach_of(store, candidate) != CONTROL:
            by_base[candidate.base][name] = candidate
    if len(by_base) < 2:
        return None
    best = {base: max(own, key=body.mean) for base, own in by_base.items()}
    records = {base: BaseBody.read(store, base) for base in by_base}
    sizes = {base: record.weight_bytes for base, record in records.items()}
    leading = best[max(best, key=lambda base: (body.mean(best[base]), -sizes[base]))]
    level, rows = Level(body.confidence, body.seed), []
    for base, own in by_base.items():
        stated, name = body.candidates[best[base]], best[base]
        gap = difference(columns[name, body.primary], columns[leading, body.primary], level).difference
        trained = {each.training for each in own.values() if each.training is not None}
        peaks = [TrainingBody.read(store, digest).peak_memory_bytes for digest in trained]
        rows.append(
            MeasuredBase(
                base=records[base].title,
                digest=base,
                size=sizes[base],
                memory=max(peaks, default=None),
                candidate=name,
                score=stated.metrics[body.primary],
                per_second=body.n / stated.seconds if stated.seconds else 0.0,
                difference=gap,
                not_worse=name == leading or gap.low > -MARGIN,
            )
        )
    rows.sort(key=lambda row: (row.size, row.base))
    chosen = next(row for row in rows if row.not_worse)
    said = (
        f"{chosen.base} is the smallest base whose best candidate is not worse: {chosen.candidate}, with "
        f"{percent(chosen.score.mean)}. Not worse: the whole {body.confidence:.0%} interval of its difference to "
        f"{leading}, request by request, is above {points(-MARGIN)} points."
    )
    return ComparedBases(bases=tuple(rows), smallest=chosen.digest, sentence=said)
