"""The drift watch: shifts found by their size, floods capped, missing evidence never called stable."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from tests.fabricate import NAME, Scene, lamp
from tunesmith.evaluation.stats.statistics import Interval
from tunesmith.monitoring import drift
from tunesmith.monitoring.drift import Baseline, ServedRequest, compare_feature, drift_report, request_features
from tunesmith.monitoring.settings import MonitoringSettings
from tunesmith.registry.versions import Version
from tunesmith.store.tables import RequestRow

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SETTINGS = MonitoringSettings()
RNG = np.random.default_rng(5)
TEST_SPLIT = Baseline(
    features={"characters": RNG.normal(60, 10, 300).round().tolist(), "nearest": RNG.beta(8, 2, 300).tolist()},
    json_valid=Interval(0.98, 0.95, 0.995),
)


def serve(
    scene: Scene, version: Version, characters: Sequence[Any], *, valid: float = 0.98, hours_ago: float = 1.0,
    tenant: str = "", nearest: float | None = None, prefix: str = "r",
) -> None:  # fmt: skip
    rng = np.random.default_rng(6)
    at = (NOW - timedelta(hours=hours_ago)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    with scene.store.writing() as session:
        for number, length in enumerate(characters):
            session.add(
                RequestRow(
                    id=f"{prefix}{number}", at=at, name=NAME, version=version.digest, arm="stable", ok=True,
                    seconds=0.1, tenant=tenant, scores={"json_valid": float(rng.random() < valid)},
                    features={"characters": length, "nearest": float(rng.beta(8, 2)) if nearest is None else nearest},
                )
            )  # fmt: skip


def look(scene: Scene, version: Version, measure: Any = lambda *_: TEST_SPLIT, **more: Any) -> drift.Report:
    return drift_report(scene.store, SETTINGS, version, measure=measure, clock=lambda: NOW, **more)


def like_the_test_split(count: int, shift: float = 0.0) -> list[float]:
    return np.random.default_rng(9).normal(60 + shift, 10, count).round().tolist()


def test_traffic_like_the_test_split_is_stable(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[1], like_the_test_split(400))
    serve(scene, versions[1], like_the_test_split(150, shift=99), hours_ago=25, prefix="old")
    serve(scene, versions[2], like_the_test_split(150, shift=99), hours_ago=1, prefix="other")
    report = look(scene, versions[1])
    assert json.loads(json.dumps(report.document(), allow_nan=False))["findings"][0]["bound"] == SETTINGS.shift_at_most
    assert (report.verdict, report.requests, report.recommendation) == ("stable", 400, None)
    assert {finding.name: finding.outcome for finding in report.findings} == {
        "characters": "stable", "nearest": "stable", "unlike": "stable", "json_valid": "stable",
    }  # fmt: skip


def test_longer_requests_or_fewer_valid_answers_are_drift(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[1], like_the_test_split(400, shift=15))
    report = look(scene, versions[1])
    assert report.verdict == "drift"
    assert (report.recommendation or "").startswith("retrain")
    moved = next(finding for finding in report.findings if finding.name == "characters")
    assert moved.low is not None
    assert moved.low > SETTINGS.shift_at_most
    assert moved.p_value is not None
    assert moved.p_value < 1e-6
    serve(scene, versions[2], like_the_test_split(400), valid=0.6, prefix="invalid")
    report = look(scene, versions[2])
    assert (report.verdict, getattr(report.recommendation, "verb", "")) == ("drift", "rollout rollback")


def test_a_new_topic_of_few_requests_is_drift_although_the_distributions_hardly_differ() -> None:
    draw = np.random.default_rng(3)

    def verdicts(share: float) -> dict[str, str]:
        topic = draw.random(500) < share
        served = np.where(topic, draw.beta(4, 4, 500), draw.beta(8, 2, 500))
        baseline = Baseline(features={"nearest": draw.beta(8, 2, 1000).tolist()})
        rows = [ServedRequest("", {"nearest": float(value)}) for value in served]
        return {finding.name: finding.outcome for finding in drift.compare(rows, baseline, SETTINGS)}

    assert verdicts(0.2) == {"nearest": "stable", "unlike": "drift"}
    assert verdicts(0.0)["unlike"] != "drift"


def test_a_small_shift_is_stable_for_any_number_of_requests() -> None:
    many, few = like_the_test_split(20_000, shift=3), like_the_test_split(600, shift=3)
    found = [compare_feature("characters", rows, TEST_SPLIT.features["characters"], SETTINGS) for rows in (few, many)]
    assert [finding.outcome for finding in found] == ["stable", "stable"]
    assert found[1].p_value is not None
    assert found[1].p_value < 0.001  # the test alone would have called it drift


def test_few_requests_and_nothing_but_constants_are_inconclusive(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[2], like_the_test_split(30), prefix="few")
    for version, says in ((1, "no request was served"), (2, "30 requests in the window: fewer")):
        report = look(scene, versions[version], measure=lambda *_: pytest.fail("measured in vain"))
        assert (report.verdict, report.reason[: len(says)]) == ("inconclusive", says)
    serve(scene, versions[3], [7] * 200, nearest=0.5)
    constants = Baseline({"characters": [7.0] * 50, "nearest": [0.5] * 50})
    report = look(scene, versions[3], measure=lambda *_: constants)
    assert (report.verdict, "every one is constant" in report.reason) == ("inconclusive", True)


def test_one_flooding_tenant_does_not_change_the_verdict(scene: Scene, versions: dict[int, Version]) -> None:
    serve(scene, versions[1], like_the_test_split(1500, shift=40), tenant="loud", prefix="l", hours_ago=0.5)
    serve(scene, versions[1], like_the_test_split(300), tenant="a", prefix="a")
    report = look(scene, versions[1])
    assert report.capped == {"loud": 1200}
    assert "loud" not in look(scene, versions[1], tenant="loud").capped


@pytest.mark.parametrize(
    ("served", "share", "left"),
    [
        ("a" * 60 + "b" * 20 + "c" * 20, 0.5, {"a": 40, "b": 20, "c": 20}),
        ("a" * 60 + "b" * 50, 0.3, {"a": 50, "b": 50}),  # equal parts where the share is too small to be kept
        ("a" * 60 + "b", 0.5, {"a": 1, "b": 1}),
        ("a" * 60, 0.5, {"a": 60}),
    ],
)
def test_after_capping_no_tenant_has_more_than_the_share(served: str, share: float, left: dict[str, int]) -> None:
    kept, capped = drift.cap_tenants([ServedRequest(tenant, {}) for tenant in served], share)
    assert Counter(row.tenant for row in kept) == left
    assert Counter(left) + Counter(capped) == Counter(served)


def test_constant_features_and_dead_embeddings() -> None:
    same = compare_feature("nearest", [0.0] * 200, [0.0] * 50, SETTINGS)
    dead = compare_feature("nearest", [0.0] * 200, TEST_SPLIT.features["nearest"], SETTINGS)
    moved = compare_feature("nearest", [1.0] * 200, [0.0] * 50, SETTINGS)
    assert [same.outcome, dead.outcome, moved.outcome] == ["constant", "drift", "drift"]


@pytest.mark.parametrize("bad", [math.nan, None, True, "long", math.inf])
def test_unusable_values_are_no_evidence(bad: Any) -> None:
    measured = TEST_SPLIT.features["characters"]
    assert compare_feature("characters", [bad] * 500, measured, SETTINGS).outcome == "inconclusive"
    mixed = compare_feature("characters", [*like_the_test_split(400), bad], measured, SETTINGS)
    assert (mixed.outcome, mixed.served) == ("stable", 400)
    assert "1 unusable values dropped" in mixed.reason


def test_served_and_measured_requests_have_the_same_features() -> None:
    rows = [lamp(number) for number in range(3)]
    measured = drift.measured_features(rows, lambda messages: len(messages) / 10)
    one = request_features(rows[2].request, lambda messages: len(messages) / 10)
    assert {name: values[2] for name, values in measured.items()} == one
    assert one == {"characters": 26.0, "nearest": 0.1}
    assert set(request_features(rows[2].request, None)) == {"characters"}
