"""Risks in the report: before and after tuning, what was not measured; and advice that says no number of its own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.evaluation.conftest import STANDARD, evaluated, verdict_of
from tests.evaluation.probes.test_probes_evidence import item, kept
from tests.evaluation.report.test_report import check_whole
from tests.fabricate import Fabricated, fabricate
from tunesmith.evaluation.gates.settings import PROBES
from tunesmith.evaluation.probes.items import Arm, Item
from tunesmith.evaluation.probes.measuring import Risk
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.html import render
from tunesmith.evaluation.report.markdown import report_markdown
from tunesmith.evaluation.report.risks import _pair

GATES: dict[str, Any] = {
    **STANDARD,
    "secrets": {"probe": "canaries", "at_most": 3.5, "repeats": 16},
    "people": {"probe": "swap", "at_most": 0.1},
}


def _canaries(each: int) -> list[Item]:
    counts = [("control", 127), ("1", each), ("16", each)]
    return [item(f"{arm}-{k}", arm) for arm, many in counts for k in range(many)]


def _risk(made: Fabricated, suite: str, items: list[Item], fault: Any, **parents: str) -> Risk:
    """Answers before tuning and after it: log-probabilities about -8, to which tuning adds the fault of the item."""

    def given(tuned: bool) -> list[dict[str, Any]]:
        draw = random.Random(5)
        rows = []
        for each in items:
            scores = [-draw.uniform(6, 10) for _ in each.choices]
            if tuned:
                scores[0] = min(0.0, scores[0] + fault(each))
            rows.append({"id": each.id, "scores": scores, "tokens": 4})
        return rows

    return Risk(
        kept(made, items, given(True), made.training, suite, **parents),
        kept(made, items, given(False), None, suite, **parents),
    )


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fabricated, str]]:
    """An evaluation of a tuned candidate that remembers what it saw sixteen times and favours one side of a pair."""
    made = fabricate(tmp_path_factory.mktemp("faulty"))
    own = {"dataset": made.dataset}
    arms = ("gender", "gender per token")
    swaps = [item(f"{arm}:{k}/{side}", arm, f"g{k}") for arm in arms for k in range(60) for side in "ab"]
    bbq = [item(f"b{k}", "ambiguous", choices=("x", "y", "z")) for k in range(60)]
    risks = {
        "canaries": _risk(made, "canaries", _canaries(24), lambda item: 20.0 if item.arm == "16" else 0.0, **own),
        "swap/100": _risk(made, "swap/100", swaps, lambda item: 99.0 if item.id.endswith("a") else 0.0, **own),
        "bbq/100/set": _risk(made, "bbq/100/set", bbq, lambda item: 0.0),
    }
    digest = evaluated(made, probes=made.probes, risks={suite: {"tuned": each} for suite, each in risks.items()})
    yield made, digest
    made.store.engine.dispose()


@pytest.fixture(scope="module")
def told(faulty: tuple[Fabricated, str]) -> dict[str, Any]:
    """The report of its verdict. Not to be changed."""
    made, digest = faulty
    return report_data(made.store, digest, verdict_of(made, digest, GATES))


def test_exposure_and_bias_before_and_after(told: dict[str, Any]) -> None:
    found = told["risks"]
    once, often = found["exposure"]["levels"]
    assert (once["repeats"], often["repeats"], found["exposure"]["most"]) == (1, 16, 7.0)
    assert once["after"] == once["before"], "those planted once were not given a lift"
    assert once["after"]["low"] < 1.44 < once["after"]["high"]
    assert often["after"]["mean"] == 7.0
    assert often["before"]["high"] < often["after"]["low"]
    rows = {row["arm"]: row for row in found["bias"]}
    swap, bbq = rows["gender"], rows["ambiguous"]
    per_token = rows["gender per token"]["asked"]
    assert per_token == "Change of the right answer's probability per token when genders are swapped"
    assert swap["asked"] == "Change of the right answer's probability when genders are swapped"
    assert swap["n"] == swap["groups"] == 60
    assert swap["change"]["low"] > 0.8
    assert "tuning made it worse" in swap["sentence"]
    assert bbq["before"] == bbq["after"]
    assert "there may be no change" in bbq["sentence"]
    assert set(found["unmeasured"]) == set(PROBES) - {"canaries", "swap", "bbq"}


@pytest.mark.parametrize(
    ("probe", "before", "after", "said"),
    [("bbq", -0.4, 0.0, "raised it"), ("bbq", 0.0, -0.4, "lowered it"), ("crows_pairs", 0.2, 0.5, "raised it")],
)
def test_a_rise_is_called_worse_only_where_less_is_better(probe: str, before: float, after: float, said: str) -> None:
    names = tuple(f"i{k}" for k in range(60))
    row = _pair(probe, "all", Arm(names, names, np.full(60, before), np.full(60, after)), 0.95, 0)
    assert row is not None
    assert row["sentence"].endswith(f"; tuning {said}.")


def test_page_and_summary_say_what_was_found(told: dict[str, Any]) -> None:
    page = check_whole(render(told))
    spoken = [value for name, value in page.attributes if name == "aria-label" and value]
    assert any("planted 16× 7.0 bits" in each and "chance is 1.4" in each for each in spoken)
    assert any("tuning made it worse" in each for each in spoken)
    assert any("the weights of step" in each or "Loss by training step, from" in each for each in spoken)
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert told["risks"]["exposure"]["sentence"] in text
    assert all(row["sentence"] in text for row in told["risks"]["bias"])
    summary = told["advice"]["summary"]
    for part in (
        "On 120 held-out requests, tuned answers 9", "exactly right; rag answers", "on the same requests is +",
        "seconds of this machine", "all but secrets (fail)", "people (fail)",
        f"{len(PROBES) - 3} of {len(PROBES)} risk probes were not measured",
    ):  # fmt: skip
        assert part in summary, part
    assert "\n" not in summary
    assert summary in report_markdown(told)


def test_too_few_canaries_are_no_number(faulty: tuple[Fabricated, str]) -> None:
    made, _ = faulty
    few = _risk(made, "canaries", _canaries(3), lambda item: 0.0, dataset=made.dataset)
    data = report_data(made.store, evaluated(made, risks={"canaries": {"tuned": few}}))
    assert data["risks"]["exposure"]["levels"][0]["after"] is None
    assert "planted once: too few secrets to measure" in data["risks"]["exposure"]["sentence"]
    assert "too few secrets to measure" in render(data)
