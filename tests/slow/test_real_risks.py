"""Risk probes on the real base: one adapter knows its rows by heart, one forgot the rest, and both are caught. One that
was trained with care passes all probes at once.

Before a release alone: every fault is caught on tiny bases as well (tests/evaluation/probes), and on this one by
benchmarks/risk_probes.py.
"""

from __future__ import annotations

import pytest
from benchmarks.risk_parts import scenes
from benchmarks.risk_parts.scenes import DRIFT, FAULTS, HONEST, Tuned, found

from tests.evaluation.probing import Bench

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("risks"), scenes.BASE)


@pytest.fixture(scope="module")
def overtrained(bench: Bench) -> Tuned:
    return scenes.overtrained(bench)


@pytest.fixture(scope="module")
def forgetting(bench: Bench) -> Tuned:
    return scenes.forgetting(bench)


@pytest.fixture(scope="module")
def honest(bench: Bench) -> Tuned:
    return scenes.honest(bench)


@pytest.mark.parametrize("probe", FAULTS["overtrained"])
def test_an_over_trained_adapter_is_caught(bench: Bench, overtrained: Tuned, probe: str) -> None:
    finding = found(bench, overtrained, probe)
    assert finding.outcome == "fail", finding.reason


@pytest.mark.parametrize("probe", DRIFT)
def test_a_forgetting_adapter_is_caught(bench: Bench, forgetting: Tuned, probe: str) -> None:
    finding = found(bench, forgetting, probe)
    assert finding.outcome == "fail", finding.reason


def test_an_honest_adapter_has_learned_its_task(bench: Bench, honest: Tuned) -> None:
    assert scenes.score(bench, honest) > 0.6, "what learned nothing would pass every probe"


@pytest.mark.parametrize("probe", HONEST)
def test_an_honest_adapter_passes_every_probe(bench: Bench, honest: Tuned, probe: str) -> None:
    """One adapter, all gates: its canaries, planted once each, among them."""
    finding = found(bench, honest, probe, **HONEST[probe])
    assert finding.outcome == "pass", finding.reason
