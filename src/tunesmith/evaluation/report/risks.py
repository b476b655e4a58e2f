"""The risk probes' results of one candidate for the report: before tuning, after tuning, and what was not measured.

A gate judges one number of a probe. The report shows all of them, with the evaluation's confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tunesmith.core.errors import Inconclusive
from tunesmith.core.text.wording import percent, points
from tunesmith.evaluation.gates.probe_judging import FEWEST_CONTROLS, WIDEST_BITS, swap_gaps
from tunesmith.evaluation.gates.settings import PROBES
from tunesmith.evaluation.probes import memory, numbers
from tunesmith.evaluation.probes.bias import PER_TOKEN
from tunesmith.evaluation.probes.items import Arm, Measured, read_measurements
from tunesmith.evaluation.report.evidence import Bias, Exposure, ExposureLevel, Risks
from tunesmith.evaluation.scores import metric_interval
from tunesmith.evaluation.stats.statistics import Floats, interval
from tunesmith.records.evaluation import EvaluationBody, MetricInterval
from tunesmith.store.records import Record
from tunesmith.store.store import Store

CHANCE_BITS = 1 / math.log(2)  # mean exposure of secrets that were not memorised: -log2 of a random rank
_ENDS = {"swap": (0.0, 1.0), "bbq": (-1.0, 1.0), "crows_pairs": (0.0, 1.0)}
_ASKED = {
    "swap": "Change of the right answer's probability{per_token} when {arm} are swapped",
    "bbq": "BBQ: preference for the stereotyped answer in ambiguous questions (0 is none)",
    "crows_pairs": "CrowS-Pairs: probability of the more stereotyping sentence (50% favours neither)",
}
_ARMS = {"gender": "genders", "names": "names of two places"}


def risks(store: Store, record: Record, focus: str, confidence: float) -> Risks:
    """The risk probes of the candidate in focus. Raises Inconclusive for inconsistent measurements."""
    seed = EvaluationBody.of(record).seed
    found = {
        suite: measured for (suite, name), measured in sorted(read_measurements(store, record).items()) if name == focus
    }
    exposure, bias = None, list[Bias]()
    for suite, measured in found.items():
        probe = suite.partition("/")[0]
        if probe == "canaries":
            exposure = _exposure(measured, confidence, seed)
        elif probe in _ENDS:
            bias += [row for arm in measured if (row := _pair(probe, arm, measured[arm], confidence, seed))]
    asked = {suite.partition("/")[0] for suite in found} | ({"membership_tpr"} if _has(found, "membership") else set())
    unmeasured = {probe: what.split(" (")[0] for probe, what in PROBES.items() if probe not in asked}
    return Risks(exposure=exposure, bias=tuple(bias), unmeasured=unmeasured)


def _has(found: Mapping[str, Measured], probe: str) -> bool:
    return any(suite.partition("/")[0] == probe for suite in found)


def _exposure(measured: Measured, confidence: float, seed: int) -> Exposure | None:
    controls = measured.get(memory.CONTROL)
    if controls is None or len(controls.ids) < FEWEST_CONTROLS:
        return None
    levels: list[ExposureLevel] = []
    for times in sorted(int(name) for name in measured if name != memory.CONTROL):
        arm = measured[str(times)]
        before = None
        if arm.before is not None and controls.before is not None:
            before = _bits(arm.before, controls.before, confidence, seed)
        after = _bits(arm.after, controls.after, confidence, seed)
        levels.append(ExposureLevel(repeats=times, n=len(arm.ids), before=before, after=after))
    if not levels:
        return None
    most = math.log2(len(controls.ids) + 1)
    told = "; ".join(f"{_times(level.repeats)}: {_level(level.after)}" for level in levels)
    sentence = (
        f"Exposure of secrets planted in the training rows: {told}. {CHANCE_BITS:.1f} bits is chance; {most:.1f} bits "
        f"is the most that {len(controls.ids)} controls can show. More bits mean that the model memorised more."
    )
    return Exposure(controls=len(controls.ids), most=most, levels=tuple(levels), sentence=sentence)


def _bits(planted: Floats, controls: Floats, confidence: float, seed: int) -> MetricInterval | None:
    found = numbers.exposure_interval(planted, controls, confidence=confidence, seed=seed)
    return metric_interval(found) if found.high - found.low <= WIDEST_BITS else None


def _times(repeats: int) -> str:
    return "planted once" if repeats == 1 else f"planted {repeats} times"


def _level(found: MetricInterval | None) -> str:
    if found is None:
        return "too few secrets to measure"
    return f"{found.mean:.1f} bits ({found.low:.1f} to {found.high:.1f})"


def _pair(probe: str, name: str, arm: Arm, confidence: float, seed: int) -> Bias | None:
    """One row of the chart; None where there are too few groups for an interval."""
    try:
        before, after, groups = _sides(probe, name, arm)
        numbers.check_groups("items", groups)
    except Inconclusive:
        return None
    ends = _ENDS[probe]
    reach = ends[1] - ends[0]

    def mean(values: Floats, ends: tuple[float, float]) -> MetricInterval:
        return metric_interval(interval(values, groups, ends=ends, confidence=confidence, seed=seed))

    old, new, change = mean(before, ends), mean(after, ends), mean(after - before, (-reach, reach))
    kind = name.removesuffix(PER_TOKEN)
    sentence = (
        f"{_size(probe, old.mean)} before tuning, {_size(probe, new.mean)} after: a change of {points(change.mean)} "
        f"points ({points(change.low)} to {points(change.high)}); {_meaning(probe, change)}."
    )
    return Bias(
        probe=probe,
        arm=name,
        asked=_ASKED[probe].format(arm=_ARMS.get(kind, kind), per_token=name.removeprefix(kind)),
        n=len(after),
        groups=len(set(groups)),
        ends=ends,
        before=old,
        after=new,
        change=change,
        sentence=sentence,
    )


def _sides(probe: str, name: str, arm: Arm) -> tuple[Floats, Floats, Sequence[str]]:
    if probe == "swap":
        before, after, groups = swap_gaps(name, arm)
        return abs(before), abs(after), groups
    if arm.before is None:
        raise Inconclusive("nothing was measured before tuning")
    return arm.before, arm.after, arm.groups


def _size(probe: str, mean: float) -> str:
    if probe == "crows_pairs":
        return percent(mean)
    return f"{points(mean)} points" if probe == "bbq" else f"{mean * 100:.1f} points"


def _meaning(probe: str, change: MetricInterval) -> str:
    raised, lowered = "tuning made it worse", "tuning made it better"
    if probe in ("bbq", "crows_pairs"):  # whose neutral value lies between the ends, so that either may be better
        raised, lowered = "tuning raised it", "tuning lowered it"
    return raised if change.low > 0.0 else lowered if change.high < 0.0 else "there may be no change"
