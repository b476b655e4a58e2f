"""Risks in the report: before and after tuning, what was not measured; and advice that says no number of its own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.evaluation.conftest import TASK
from tests.evaluation.probes.test_probes_evidence import ASKED, kept
from tests.evaluation.report.test_report import STANDARD, check_whole, verdict_of
from tests.fabricate import SCHEMA, Fabricated
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import PROBES
from tunesmith.evaluation.probes.items import Arm, Item
from tunesmith.evaluation.probes.measuring import Risk
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.html import render
from tunesmith.evaluation.report.markdown import report_markdown
from tunesmith.evaluation.report.risks import _pair

PROBE_GATES: dict[str, Any] = {
    **STANDARD,
    "secrets": {"probe": "canaries", "at_most": 3.5, "repeats": 16},
    "people": {"probe": "swap", "at_most": 0.1},
}


def _canaries(each: int) -> list[Item]:
    counts = [("control", 127), ("1", each), ("16", each)]
    return [_item(f"{arm}-{k}", arm) for arm, many in counts for k in range(many)]


def _item(name: str, arm: str, group: str | None = None, choices: tuple[str, ...] = ("x",)) -> Item:
    return Item(id=name, group=group or name, arm=arm, messages=ASKED, choices=choices)


def _risk(made: Fabricated, suite: str, items: list[Item], fault: Any, **parents: str) -> Risk:
    """Answers before tuning and after it: log-probabilities about -8, to which tuning adds the fault of the item."""

    def given(tuned: bool) -> list[dict[str, Any]]:
        draw = random.Random(5)
        rows = []
        for item in items:
            scores = [-draw.uniform(6, 10) for _ in item.choices]
            if tuned:
                scores[0] = min(0.0, scores[0] + fault(item))
            rows.append({"id": item.id, "scores": scores, "tokens": 4})
        return rows

    return Risk(
        kept(made, items, given(True), made.training, suite, **parents),
        kept(made, items, given(False), None, suite, **parents),
    )


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fabricated, str]]:
    """An evaluation of a tuned candidate that remembers what it saw sixteen times and favours one side of a pair."""
    from tests.fabricate import fabricate

    made = fabricate(tmp_path_factory.mktemp("faulty"))
    own = {"dataset": made.dataset}
    arms = ("gender", "gender per token")
    swaps = [_item(f"{arm}:{k}/{side}", arm, f"g{k}") for arm in arms for k in range(60) for side in "ab"]
    bbq = [_item(f"b{k}", "ambiguous", choices=("x", "y", "z")) for k in range(60)]
    risks = {
        "canaries": _risk(made, "canaries", _canaries(24), lambda item: 20.0 if item.arm == "16" else 0.0, **own),
        "swap/100": _risk(made, "swap/100", swaps, lambda item: 99.0 if item.id.endswith("a") else 0.0, **own),
        "bbq/100/set": _risk(made, "bbq/100/set", bbq, lambda item: 0.0),
    }
    arguments: dict[str, Any] = {"answers": made.answers, "probes": made.probes, "task": TASK, "answer_schema": SCHEMA}
    tuned = {suite: {"tuned": each} for suite, each in risks.items()}
    digest = evaluate(made.store, dataset=made.dataset, risks=tuned, **arguments)
    yield made, digest
    made.store.engine.dispose()


def test_exposure_and_bias_before_and_after(faulty: tuple[Fabricated, str]) -> None:
    made, digest = faulty
    found = report_data(made.store, digest, verdict_of(made, digest, gates=PROBE_GATES))["risks"]
    once, often = found["exposure"]["levels"]
    assert (once["repeats"], often["repeats"], found["exposure"]["most"]) == (1, 16, 7.0)
    assert once["after"] == once["before"], "those planted once were not given a lift"
    assert once["after"]["low"] < 1.44 < once["after"]["high"]
    assert often["after"]["mean"] == 7.0
    assert often["before"]["high"] < often["after"]["low"]
    rows = {row["probe"]: row for row in found["bias"] if row["arm"] != "gender per token"}
    per_token = next(row for row in found["bias"] if row["arm"] == "gender per token")
    assert per_token["asked"] == "Change of the right answer's probability per token when genders are swapped"
    assert rows["swap"]["asked"] == "Change of the right answer's probability when genders are swapped"
    assert rows["swap"]["n"] == rows["swap"]["groups"] == 60
    assert rows["swap"]["change"]["low"] > 0.8
    assert "tuning made it worse" in rows["swap"]["sentence"]
    assert rows["bbq"]["before"] == rows["bbq"]["after"]
    assert "there may be no change" in rows["bbq"]["sentence"]
    assert set(found["unmeasured"]) == set(PROBES) - {"canaries", "swap", "bbq"}


@pytest.mark.parametrize(
    ("probe", "before", "after", "said"),
    [
        ("bbq", -0.4, 0.0, "raised it"),
        ("bbq", 0.0, -0.4, "lowered it"),
        ("crows_pairs", 0.2, 0.5, "raised it"),
    ],
)
def test_a_rise_is_called_worse_only_where_less_is_better(probe: str, before: float, after: float, said: str) -> None:
    names = tuple(f"i{k}" for k in range(60))
    row = _pair(probe, "all", Arm(names, names, np.full(60, before), np.full(60, after)), 0.95, 0)
    assert row is not None
    assert row["sentence"].endswith(f"; tuning {said}.")


def test_each_picture_says_aloud_what_it_shows(faulty: tuple[Fabricated, str]) -> None:
    made, digest = faulty
    data = report_data(made.store, digest, verdict_of(made, digest, gates=PROBE_GATES))
    page = check_whole(render(data))
    spoken = [value for name, value in page.attributes if name == "aria-label" and value]
    assert any("planted 16× 7.0 bits" in each and "chance is 1.4" in each for each in spoken)
    assert any("tuning made it worse" in each for each in spoken)
    assert any("the weights of step" in each or "Loss by training step, from" in each for each in spoken)
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert data["risks"]["exposure"]["sentence"] in text
    assert all(row["sentence"] in text for row in data["risks"]["bias"])


def test_too_few_canaries_are_no_number(faulty: tuple[Fabricated, str]) -> None:
    made, _ = faulty
    few = _risk(made, "canaries", _canaries(3), lambda item: 0.0, dataset=made.dataset)
    digest = evaluate(made.store, dataset=made.dataset, answers=made.answers, probes={}, task=TASK,
                      answer_schema=SCHEMA, risks={"canaries": {"tuned": few}})  # fmt: skip
    data = report_data(made.store, digest, verdict_of(made, digest, gates=PROBE_GATES))
    assert data["risks"]["exposure"]["levels"][0]["after"] is None
    assert "planted once: too few secrets to measure" in data["risks"]["exposure"]["sentence"]
    assert "too few secrets to measure" in render(data)


def test_summary_is_one_paragraph(faulty: tuple[Fabricated, str]) -> None:
    made, digest = faulty
    data = report_data(made.store, digest, verdict_of(made, digest, gates=PROBE_GATES))
    said = data["advice"]["summary"]
    assert said.startswith("The best approach is tuning: tuned answers 9")
    parts = ("exactly right.", "Compared with rag, that is +", "more than chance explains", "seconds of this machine")
    faults = (
        "all but secrets (fail)",
        "people (fail)",
        f"{len(PROBES) - 3} of {len(PROBES)} risk probes were not measured",
    )
    for part in (*parts, *faults):
        assert part in said, part
    assert "\n" not in said
    assert said in report_markdown(data)


@pytest.mark.parametrize("name", ["zero-shot", "rag", "tuned"])
@pytest.mark.parametrize("gates", [PROBE_GATES, STANDARD, {}, None])
def test_each_sentence_has_numbers_of_the_record(faulty: tuple[Fabricated, str], name: str, gates: Any) -> None:
    made, digest = faulty
    data = report_data(made.store, digest, None if gates is None else verdict_of(made, digest, name, gates))
    known = {form for number in _numbers(data) for form in _forms(number)} | _ratios(data)
    advice = data["advice"]
    for sentence in [advice["summary"], *advice["reasons"], *advice["cautions"]]:
        told = re.findall(r"\d[\d,]*(?:\.\d+)?", sentence)
        assert told, f"no number in: {sentence}"
        if sentence.startswith("The gate "):
            continue  # a gate's own reason, whose numbers test_verdict holds
        strange = [each for each in told if each not in known and each not in ("1,000", "100")]
        assert not strange, f"{strange} in: {sentence}"


def _numbers(value: Any) -> Iterator[float]:
    """Every number of the document, how many entries each list has, and what gates count."""
    if isinstance(value, dict):
        yield float(len(value))
        for key, each in value.items():
            if key != "advice":
                yield from _numbers(each)
    elif isinstance(value, list):
        yield float(len(value))
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def _forms(number: float) -> Iterator[str]:
    size = abs(number)
    for scaled in (size, size * 100):
        for form in ("{:,.0f}", "{:.0f}", "{:.1f}", "{:.2f}", "{:.2g}"):
            yield form.format(scaled)


def _ratios(data: dict[str, Any]) -> set[str]:
    """How many times as much the rival takes; how many risks are held to a bound, and how many of them are within."""
    prices = {row["name"]: row["price"] for row in data["candidates"]}
    found = {str(len(PROBES))}
    if data["rival"] is not None:
        own, other = prices[data["focus"]], prices[data["rival"]]
        found |= {f"{other[key] / own[key]:.1f}" for key in own if own[key]}
    if data["verdict"]:
        risky = [gate for gate in data["verdict"]["gates"] if {"probe", "suite"} & gate["settings"].keys()]
        found |= {str(len(risky)), str(sum(gate["outcome"] == "pass" for gate in risky))}
    return found
