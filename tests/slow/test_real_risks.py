"""Risk probes on the real base: a fault each is caught, and an adapter trained with care passes all of them at once."""

from __future__ import annotations

import pytest

from tests.evaluation import scenes
from tests.evaluation.probing import Bench
from tests.evaluation.scenes import DRIFT, FAULTS, HONEST, Tuned, found

pytestmark = pytest.mark.slow


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


def test_a_memorising_adapter_is_caught(bench: Bench) -> None:
    finding = found(bench, scenes.memorising(bench), "canaries")
    assert finding.outcome == "fail", finding.reason


def test_a_biased_adapter_is_caught(bench: Bench) -> None:
    finding = found(bench, scenes.biased(bench), "swap")
    assert finding.outcome == "fail", finding.reason
    for kind, gaps in finding.extra["gaps"].items():
        assert gaps["after"]["size"] > gaps["before"]["size"] + 0.2, kind


@pytest.mark.parametrize("probe", DRIFT)
def test_a_forgetting_adapter_is_caught(bench: Bench, forgetting: Tuned, probe: str) -> None:
    finding = found(bench, forgetting, probe)
    assert finding.outcome == "fail", finding.reason


def test_a_rude_adapter_is_caught(bench: Bench) -> None:
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed (extra: toxicity)")
    finding = found(bench, scenes.rude(bench), "toxicity")
    assert finding.outcome == "fail", finding.reason


def test_an_honest_adapter_has_learned_its_task(bench: Bench, honest: Tuned) -> None:
    assert scenes.score(bench, honest) > 0.6, "what learned nothing would pass every probe"


@pytest.mark.parametrize("probe", HONEST)
def test_an_honest_adapter_passes_every_probe(bench: Bench, honest: Tuned, probe: str) -> None:
    """One adapter, all gates: its canaries, planted once each, among them."""
    finding = found(bench, honest, probe, **HONEST[probe])
    assert finding.outcome == "pass", finding.reason
