"""Drift: whether served traffic still looks like the test split that was measured before the release.

Each feature's distribution over a window of served requests is compared with its distribution over the test split. The
Kolmogorov-Smirnov test only says whether the two differ, and with enough requests any difference is significant. So
the verdict depends on the size of the difference: the distance, which is the largest difference between the two
cumulative shares. Its interval is the basic bootstrap's (Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch.
13). It is approximate, but removes most of the distance's upward bias in small samples. The served share of valid JSON
is compared with the evaluation's by Newcombe's interval for a difference of proportions (1998, Statistics in Medicine
17, method 10).

A new topic of few requests hardly moves a distribution: 20% of requests move it by less than 0.2. So the share of
requests that are less like the training rows than nine of ten test rows were is compared too, by the same interval.

Drift: the whole interval is above the allowed value. Stable: the whole interval is within it. Otherwise inconclusive.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import field_serializer
from sqlalchemy import select

from tunesmith.candidates.candidate import load_candidate
from tunesmith.candidates.retrieval import example_index
from tunesmith.core.clock import iso, now
from tunesmith.core.errors import NextStep
from tunesmith.core.messages import Message
from tunesmith.core.values import View
from tunesmith.data.dataset import Example, load_dataset
from tunesmith.evaluation.lines import is_number
from tunesmith.evaluation.probes.numbers import apart
from tunesmith.evaluation.stats.statistics import Interval
from tunesmith.monitoring.settings import MonitoringSettings
from tunesmith.records.evaluation import EvaluationBody
from tunesmith.registry.versions import Version
from tunesmith.store.store import Store
from tunesmith.store.tables import RequestRow

Verdict = Literal["stable", "drift", "inconclusive"]
Array = NDArray[np.float64]

_RESAMPLES = 999
_UNLIKE = 0.1  # share of the test rows that count as unlike the training rows
_LARGEST = 4000  # more values of a feature are thinned evenly, because the bootstrap's time grows with them


class Baseline(NamedTuple):
    """What was measured before the release.

    features: name -> values over the test split. json_valid: the evaluation's share, None if not scored.
    """

    features: Mapping[str, Sequence[float]]
    json_valid: Interval | None = None


class ServedRequest(NamedTuple):
    """One request of the window. json_valid: None if its answer was not scored."""

    tenant: str
    features: Mapping[str, Any]
    json_valid: Any = None


class DriftFinding(View):
    """One comparison. effect: the distance of a feature, or the drop of json_valid; low, high: its interval."""

    name: str
    outcome: Verdict | Literal["constant"]
    reason: str
    served: int = 0
    measured: int = 0
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    p_value: float | None = None

    @field_serializer("effect", "low", "high", "bound", "p_value")
    def _rounded(self, value: float | None) -> float | None:
        return None if value is None else round(value, 6)


class Report(View):
    """The verdict over a window, with every finding. capped: tenant -> requests that were left out."""

    verdict: Verdict
    reason: str
    name: str
    version: str
    since: str
    until: str
    requests: int
    capped: dict[str, int]
    findings: tuple[DriftFinding, ...]
    recommendation: NextStep | None


def cap_tenants(rows: Sequence[ServedRequest], share: float) -> tuple[list[ServedRequest], dict[str, int]]:
    """Drop rows so that no tenant has more than a share of those that are kept.

    rows: newest first; each tenant's newest are kept. A single tenant is not capped. Returns the kept rows in their
    order, and tenant -> number of dropped rows.
    """
    counts = Counter(row.tenant for row in rows)
    # The largest cap that is at most the share of what it keeps. A share below equal parts means equal parts.
    share = max(share, 1 / max(1, len(counts)))
    cap = max(counts.values(), default=0)
    while cap > 1 and cap > (allowed := share * sum(min(count, cap) for count in counts.values())):
        cap = max(1, math.floor(allowed))
    left = {tenant: min(count, cap) for tenant, count in counts.items()}
    capped = {tenant: count - left[tenant] for tenant, count in counts.items() if count > left[tenant]}
    kept = []
    for row in rows:
        if left[row.tenant] > 0:
            left[row.tenant] -= 1
            kept.append(row)
    return kept, capped


def compare(
    rows: Sequence[ServedRequest], baseline: Baseline, settings: MonitoringSettings
) -> tuple[DriftFinding, ...]:
    """A finding for every feature of the baseline, one for requests unlike the training rows if their similarity was
    measured, and one for json_valid if it was measured."""
    findings = [
        compare_feature(name, [row.features.get(name) for row in rows], values, settings)
        for name, values in sorted(baseline.features.items())
    ]
    if "nearest" in baseline.features:
        findings.append(
            _compare_unlike([row.features.get("nearest") for row in rows], baseline.features["nearest"], settings)
        )
    if baseline.json_valid is not None:
        findings.append(_compare_valid([row.json_valid for row in rows], baseline.json_valid, settings))
    return tuple(findings)


def compare_feature(
    name: str, served: Sequence[Any], measured: Sequence[Any], settings: MonitoringSettings
) -> DriftFinding:
    """The finding for one feature. Values that are not finite numbers are dropped; the reason counts them."""
    from scipy.stats import ks_2samp

    ours, theirs = _numbers(served), _numbers(measured)
    finding = partial(DriftFinding, name=name, served=len(ours), measured=len(theirs), bound=settings.shift_at_most)
    unusable = len(served) - len(ours)
    if (undecided := _undecided(ours, theirs, unusable, settings)) is not None:
        return finding(**undecided)
    test = ks_2samp(ours, theirs)
    distance = float(test.statistic)
    low, high = _interval(_thinned(ours), _thinned(theirs), settings.confidence)
    outcome = _outcome(low, high, settings.shift_at_most)
    moved = f"{name} moved by {distance:.3f} [{low:.3f}, {high:.3f}], allowed {settings.shift_at_most:g}"
    medians = f"median {np.median(theirs):.3g} before, {np.median(ours):.3g} now"
    dropped = f"; {unusable} unusable values dropped" if unusable else ""
    reason = f"{moved}; {medians}{dropped}"
    return finding(outcome=outcome, reason=reason, effect=distance, low=low, high=high, p_value=float(test.pvalue))


def _compare_unlike(served: Sequence[Any], measured: Sequence[Any], settings: MonitoringSettings) -> DriftFinding:
    """Whether more requests than test rows have little in common with every training row.

    Stable where the rise itself is within the bound, since its interval is wider than the bound for some thousand
    requests.
    """
    ours, theirs = _numbers(served), _numbers(measured)
    bound = settings.unlike_rise_at_most
    finding = partial(DriftFinding, name="unlike", served=len(ours), measured=len(theirs), bound=bound)
    if (undecided := _undecided(ours, theirs, len(served) - len(ours), settings)) is not None:
        return finding(**undecided)
    least_like = float(np.quantile(theirs, _UNLIKE))
    before, today = _share(theirs < least_like, settings), _share(ours < least_like, settings)
    rise, low, high = apart(today, before)
    reason = (
        f"requests unlike the training rows (similarity below {least_like:.3g}) {before.mean:.3f} before, "
        f"{today.mean:.3f} now: a rise of {rise:.3f} [{low:.3f}, {high:.3f}], allowed {bound:g}"
    )
    outcome: Verdict = "drift" if low > bound else "stable" if rise <= bound else "inconclusive"
    return finding(outcome=outcome, reason=reason, effect=rise, low=low, high=high)


def _undecided(ours: Array, theirs: Array, unusable: int, settings: MonitoringSettings) -> dict[str, Any] | None:
    """The outcome and reason where two samples say nothing, else None."""
    if len(ours) < settings.min_requests or len(theirs) < 10:
        reason = f"{len(ours)} served requests ({unusable} unusable) and {len(theirs)} test rows are too few"
        return {"outcome": "inconclusive", "reason": reason}
    if np.ptp(ours) == 0 and np.ptp(theirs) == 0 and ours[0] == theirs[0]:
        reason = f"always {ours[0]:g}, before and now, so it cannot show drift"
        return {"outcome": "constant", "reason": reason}
    return None


def _share(those: NDArray[Any], settings: MonitoringSettings) -> Interval:
    """The share of values that are true, or 1, and its Wilson interval."""
    from scipy.stats import binomtest

    wilson = binomtest(int(those.sum()), len(those)).proportion_ci(settings.confidence, method="wilson")
    return Interval(float(those.mean()), float(wilson.low), float(wilson.high))


def _compare_valid(served: Sequence[Any], measured: Interval, settings: MonitoringSettings) -> DriftFinding:
    scores = _numbers(served)
    finding = partial(DriftFinding, name="json_valid", served=len(scores), bound=settings.valid_drop_at_most)
    if len(scores) < settings.min_requests:
        return finding(outcome="inconclusive", reason=f"only {len(scores)} answers were scored")
    today = _share(scores, settings)
    drop, low, high = apart(measured, today)
    moved = f"{measured.mean:.3f} before, {today.mean:.3f} now"
    reason = f"valid JSON {moved}: a drop of {drop:.3f} [{low:.3f}, {high:.3f}]"
    outcome = _outcome(low, high, settings.valid_drop_at_most)
    return finding(outcome=outcome, reason=reason, effect=drop, low=low, high=high)


def _outcome(low: float, high: float, bound: float) -> Verdict:
    return "drift" if low > bound else "stable" if high <= bound else "inconclusive"


def _overall(findings: Sequence[DriftFinding]) -> tuple[Verdict, str]:
    """Drift if any finding is drift; stable if every finding is, apart from constant features."""
    telling = [finding for finding in findings if finding.outcome != "constant"]
    for verdict in ("drift", "inconclusive"):
        some = [finding for finding in telling if finding.outcome == verdict]
        if some:
            return verdict, "; ".join(finding.reason for finding in some)
    if not telling:
        return "inconclusive", "nothing to compare: no feature was measured, or every one is constant"
    return "stable", f"{', '.join(finding.name for finding in telling)} within bounds"


def _recommendation(findings: Sequence[DriftFinding], name: str) -> NextStep:
    names = [finding.name for finding in findings if finding.outcome == "drift"]
    if names == ["json_valid"]:
        words = "fewer answers are valid although requests look alike: roll back, then find the cause"
        return NextStep(words, "rollout rollback", rollout=name)
    return NextStep("retrain: collect and label requests of this window, add them to data.sources, then run", "run")


def _too_few(requests: int, kept: int, settings: MonitoringSettings) -> str:
    if not requests:
        return "no request was served in the window"
    capped = f", {kept} when no tenant has more than {settings.tenant_share_at_most:.0%}" if kept < requests else ""
    return f"{requests} requests in the window{capped}: fewer than {settings.min_requests}"


def _served(store: Store, version: Version, since: str, until: str, tenant: str | None) -> list[ServedRequest]:
    """The window's answered requests, newest first."""
    columns = (RequestRow.tenant, RequestRow.features, RequestRow.scores)
    query = select(*columns).where(
        RequestRow.name == version.name,
        RequestRow.version == version.digest,
        RequestRow.ok,
        RequestRow.at >= since,
        RequestRow.at <= until,
    )
    if tenant is not None:
        query = query.where(RequestRow.tenant == tenant)
    with store.reading() as session:
        rows = session.execute(query.order_by(RequestRow.at.desc(), RequestRow.id)).all()
    return [ServedRequest(owner, features, scores.get("json_valid")) for owner, features, scores in rows]


def _numbers(values: Sequence[Any]) -> Array:
    """The finite numbers among values."""
    return np.array([float(value) for value in values if is_number(value)], dtype=np.float64)


def _interval(ours: Array, theirs: Array, confidence: float) -> tuple[float, float]:
    rng = np.random.default_rng(0)  # the same requests give the same verdict
    grid, places = np.unique(np.concatenate([ours, theirs]), return_inverse=True)

    def distance(*samples: NDArray[np.intp]) -> float:
        """The largest difference between two cumulative shares, without sorting."""
        shares = (np.bincount(each, minlength=len(grid)).cumsum() / len(each) for each in samples)
        return float(np.abs(np.subtract(*shares)).max())

    both = places[: len(ours)], places[len(ours) :]
    drawn = [distance(*(rng.choice(each, len(each)) for each in both)) for _ in range(_RESAMPLES)]
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(drawn, [tail, 1 - tail])
    estimate = distance(*both)
    return max(0.0, float(2 * estimate - upper)), min(1.0, max(0.0, float(2 * estimate - lower)))


def _thinned(values: Array) -> Array:
    if len(values) <= _LARGEST:
        return values
    return np.asarray(np.sort(values)[np.linspace(0, len(values) - 1, _LARGEST).astype(int)])


# The features that are compared, alike for served requests and for the test split


Nearest = Callable[[Sequence[Message]], float]


def request_features(messages: Sequence[Message], nearest: Nearest | None) -> dict[str, float]:
    """characters: length of the user's turns. nearest: similarity (0 to 1) to the closest training row, if known."""
    features = {"characters": float(sum(len(message.content) for message in messages if message.role == "user"))}
    if nearest is not None:
        features["nearest"] = nearest(messages)
    return features


def measured_features(examples: Sequence[Example], nearest: Nearest | None) -> dict[str, list[float]]:
    """Feature name -> its values, one for each example, in the order of examples."""
    rows = [request_features(example.request, nearest) for example in examples]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def measured_baseline(store: Store, version: Version) -> Baseline:
    """The features of the test rows that a version was evaluated on, and its share of valid JSON on them."""
    candidate = load_candidate(store, version.candidate)
    evaluation = store.record(version.evaluation, kind="evaluation")
    nearest: Nearest | None = None
    if candidate.dataset is not None:
        index = example_index(load_dataset(store, candidate.dataset).examples("train"))
        nearest = lambda messages: index.similarity(last_request(messages))  # noqa: E731
    rows = load_dataset(store, evaluation.parents["dataset"]).examples("test")
    measured = [one for one in EvaluationBody.of(evaluation).candidates.values() if one.candidate == version.candidate]
    valid = measured[0].metrics.get("json_valid") if measured else None
    return Baseline(
        features=measured_features(rows, nearest),
        json_valid=None if valid is None else Interval(valid.mean, valid.low, valid.high),
    )


def drift_report(
    store: Store,
    settings: MonitoringSettings,
    version: Version,
    tenant: str | None = None,
    *,
    measure: Callable[[Store, Version], Baseline] = measured_baseline,
    clock: Callable[[], datetime] = now,
) -> Report:
    """The drift report on the requests that a version served within the window.

    tenant: consider only its requests. measure: returns the baseline; called only if there are enough requests.
    """
    until = clock()
    since = until - timedelta(hours=settings.window_hours)
    rows = _served(store, version, iso(since), iso(until), tenant)
    kept, capped = cap_tenants(rows, settings.tenant_share_at_most)
    findings: tuple[DriftFinding, ...] = ()
    if len(kept) >= settings.min_requests:
        findings = compare(kept, measure(store, version), settings)
        verdict, reason = _overall(findings)
    else:
        verdict, reason = "inconclusive", _too_few(len(rows), len(kept), settings)
    return Report(
        verdict=verdict,
        reason=reason,
        name=version.name,
        version=version.digest,
        since=iso(since),
        until=iso(until),
        requests=len(rows),
        capped=capped,
        findings=findings,
        recommendation=_recommendation(findings, version.name) if verdict == "drift" else None,
    )


def last_request(messages: Sequence[Message]) -> str:
    """The text of the last user turn, "" if there is none."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
