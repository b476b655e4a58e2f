"""Money, ladder, groups, classes, judges and risks in the report: the arithmetic, the page, the Markdown."""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.evaluation.conftest import STANDARD, evaluated, risk_roles, verdict_of
from tests.evaluation.probes.test_probes_evidence import item, kept
from tests.evaluation.report.test_report import check_whole
from tests.fabricate import Fabricated, add, answer_lines, fabricate, flawed, put_answers
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.settings import TokenPrice
from tunesmith.core.text.wording import money
from tunesmith.evaluation.prices import break_even
from tunesmith.evaluation.probes.catalog import PROBES
from tunesmith.evaluation.probes.measuring import Item
from tunesmith.evaluation.report.advice import advise
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.evidence import Advice, EvidenceReport, ReportedCandidate
from tunesmith.evaluation.report.html import render, report_markdown
from tunesmith.evaluation.settings import PriceSettings, TaskSettings
from tunesmith.records.candidate import RemoteModel
from tunesmith.records.evaluation import AnswerPrice

LIFT = {"lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.0}}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fabricated, str]]:
    """A store with a floor and an endpoint beside the usual four, with prices and labels."""
    folder = tmp_path_factory.mktemp("rich")
    made = fabricate(folder / "store")
    common: dict[str, Any] = {"base": made.base, "max_tokens": 128}
    floor = Candidate(name="nearest", prompt="", method="nearest", dataset=made.dataset, **common)
    add(made, floor, flawed(0.2, 1.0, 21), 0, 0.02)
    rival = RemoteModel(url="https://rival.example/v1", model="big")
    add(made, Candidate(name="rival", prompt="Answer.", endpoint=rival, **common), flawed(0.8, 1.0, 22), 210, 30.0)
    scorers = ["json_valid", "exact_match", {"name": "intent", "label": "intent"}]
    task = TaskSettings.model_validate({"scorers": scorers})
    prices, tokens = PriceSettings(machine_hour=3.6, currency="EUR"), {"rival": TokenPrice(prompt=1.0, answer=10.0)}
    digest = evaluated(made, probes=made.probes, task=task, prices=prices, tokens=tokens)
    yield made, digest
    made.store.engine.dispose()


@pytest.fixture(scope="module")
def told(rich: tuple[Fabricated, str]) -> EvidenceReport:
    """The report of the tuned candidate's verdict. Not to be changed."""
    made, digest = rich
    return report_data(made.store, digest, verdict_of(made, digest, LIFT))


def test_money_follows_from_what_was_measured(rich: tuple[Fabricated, str], told: EvidenceReport) -> None:
    made, digest = rich
    body = made.store.record(digest).body
    prices = {name: stated["price"] for name, stated in body["candidates"].items()}
    for name, price in prices.items():
        expected = price["seconds_per_1000"] * 0.001
        if name == "rival":
            expected = (price["prompt_tokens_per_1000"] + 10 * price["completion_tokens_per_1000"]) / 1e6
        assert price["money_per_1000"] == pytest.approx(expected, abs=1e-9)
    assert body["candidates"]["tuned"]["training"] == {"seconds": 159.8, "money": 0.1598}
    saved = prices["rival"]["money_per_1000"] - prices["tuned"]["money_per_1000"]
    assert told.break_even.saved_per_1000 == pytest.approx(saved)
    free = report_data(made.store, evaluated(made, answers={"rag": made.answers["rag"]}))
    assert (free.currency, free.break_even) == (None, None), "without prices nothing is said of money"
    untuned = report_data(made.store, digest, verdict_of(made, digest, LIFT, "rag"))
    for data, trained in ((told, True), (untuned, False)):
        assert data.break_even is not None
        assert ("Training repaid after" in render(data)) is trained, "an untuned candidate has no training to repay"
        assert ("The training cost" in data.advice.summary) is trained


def test_costs_are_told_where_they_are_known_and_an_endpoint_s_time_is_not_this_machine_s(told: EvidenceReport) -> None:
    assert "seconds of this machine" not in " ".join(told.advice.reasons)

    def without_money(*names: str) -> EvidenceReport:
        def changed(row: ReportedCandidate) -> ReportedCandidate:
            price = row.price.model_copy(update={"money_per_1000": None} if row.name in names else {})
            return row.model_copy(update={"price": price})

        return told.model_copy(update={"candidates": tuple(map(changed, told.candidates)), "break_even": None})

    own = next(row.price.money_per_1000 for row in told.candidates if row.name == "tuned")
    assert f"1,000 requests cost {money(own)} EUR with tuned." in advise(without_money("rival")).summary
    here = [row.name for row in told.candidates if row.name != "rival"]
    assert " seconds of this machine. " in advise(without_money(*here)).summary
    page = render(without_money(*here, "rival").model_copy(update={"currency": None}))
    (chart,) = re.findall(r'aria-label="(exact_match against seconds of this machine[^"]*)"', page)
    assert [name in chart for name in (*here, "rival")] == [True] * len(here) + [False]


@pytest.mark.parametrize(
    ("own", "rival", "spent", "expected"),
    [(0.1, 0.3, 10.0, 50_000), (0.3, 0.1, 10.0, None), (0.1, 0.1, 10.0, None), (0.1, 0.3, 0.0, 0)],
)
def test_when_tuning_pays(own: float, rival: float, spent: float, expected: int | None) -> None:
    free = AnswerPrice(prompt_tokens_per_1000=0, completion_tokens_per_1000=0, seconds_per_1000=0)
    mine, theirs = (free.model_copy(update={"money_per_1000": each}) for each in (own, rival))
    found = break_even(mine, spent, theirs)
    assert found is not None
    assert found.requests == expected
    assert break_even(mine, spent, free) is None


def test_approach_ladder_climbs_only_where_intervals_say_so(told: EvidenceReport) -> None:
    found = told.ladder
    approaches = ["baseline", "prompting", "examples in the prompt", "retrieval", "tuning", "endpoint"]
    assert [rung.approach for rung in found.rungs] == approaches
    names = "nearest zero-shot few-shot rag tuned rival"
    assert [rung.candidate for rung in found.rungs] == names.split()
    steps = {step.candidate: step for step in found.steps}
    assert steps["zero-shot"].over == "nearest"
    assert steps["zero-shot"].difference.high < 0
    assert steps["few-shot"].over == "nearest", "prompting was not shown to beat the floor"
    assert steps["rival"].over == "tuned"
    assert found.chosen.candidate == "tuned"
    groups = told.by_group
    assert groups.better + groups.worse + groups.alike == groups.groups == told.groups
    assert all(row.difference == pytest.approx(row.own - row.other) for row in groups.shown)


def test_page_and_markdown_are_whole_and_say_it_all(told: EvidenceReport) -> None:
    html = render(told)
    check_whole(html)
    for said in ("Up and to the left", "What each approach adds", "Difference by group", "Macro-F1", "EUR"):
        assert said in html
    assert "Saved per 1,000 requests" in html
    said = " ".join(told.advice.reasons + told.advice.cautions)
    for part in (
        "The best approach is tuning (tuned, 93.3%): +70.0 points",
        "Not shown to add anything to a simpler approach: prompting (zero-shot)",
    ):
        assert part in said
    rows = [line for line in report_markdown(told).splitlines() if line.startswith("| ")]
    assert sum("**tuned**" in row for row in rows) == 1
    assert len(rows) == 1 + 6 + 1 + len(LIFT)
    assert len({row.count(" | ") for row in rows[:7]}) == 1


def test_hostile_names_do_not_break_the_markdown(told: EvidenceReport) -> None:
    evil = "x | <img src=x> [a](javascript:1)\n# head `code` @all"
    rows = [row.model_copy(update={"name": evil, "how": evil}) for row in told.candidates]
    text = report_markdown(told.model_copy(update={"candidates": rows}))
    assert "<img" not in text.replace("\\<", "")
    assert "\n# head" not in text
    assert re.search(r"(?<!\\)\]\(", text) is None
    assert "\n" + "| x \\| " in text.replace("| **", "| ")


def test_an_endpoint_is_neither_released_nor_recommended(made: Fabricated) -> None:
    remote = RemoteModel(url="https://gpt.example/v1", model="big")
    endpoint = Candidate(name="gpt", prompt="Answer.", base=made.base, max_tokens=9, endpoint=remote)
    add(made, endpoint, lambda row: row.answer, 210, 30.0)
    weaker = answer_lines(made.test, flawed(0.7, 1.0, 14))
    made.answers["tuned"] = put_answers(made.store, made.candidates["tuned"], made.dataset, weaker)
    digest = evaluated(made, probes=made.probes)
    lift = {"metric": "exact_match", "over": "rag", "at_least": 0.0}

    def advice(name: str, **gates: Any) -> Advice:
        return report_data(made.store, digest, verdict_of(made, digest, {"lift": lift, **gates}, name)).advice

    passed, unknown = advice("gpt"), advice("gpt", forgetting={"suite": "general", "drop_at_most": 0.03})
    assert "gpt answers 100 of 100 requests exactly right" in passed.summary
    for found, said in ((passed, "passed its gates"), (unknown, "was judged")):
        assert found.headline == f"gpt {said}, but an endpoint cannot be released."
        assert found.release is None
        assert "tuned scored highest of 4 candidates that answer here" in found.reasons[-1]
    tuned = advice("tuned")
    assert (tuned.headline, tuned.release) == ("tuned may be released, but gpt scored higher.", "tuned")


# Risks in the report: before and after tuning, what was not measured; and advice that says no number of its own


RISK_GATES: dict[str, Any] = {
    **STANDARD,
    "secrets": {"probe": "canaries", "at_most": 3.5, "repeats": 16},
    "people": {"probe": "swap", "at_most": 0.1},
}


def _canaries(each: int) -> list[Item]:
    counts = [("control", 127), ("1", each), ("16", each)]
    return [item(f"{arm}-{k}", arm) for arm, many in counts for k in range(many)]


def _risk(made: Fabricated, suite: str, items: list[Item], fault: Any, **parents: str) -> dict[str, str | None]:
    """Answers before tuning and after it: log-probabilities about -8, to which tuning adds the fault of the item."""

    def given(training: str | None) -> str:
        draw = random.Random(5)
        rows = []
        for each in items:
            scores = [-draw.uniform(6, 10) for _ in each.choices]
            scores[0] = min(0.0, scores[0] + (fault(each) if training else 0.0))
            rows.append({"id": each.id, "scores": scores, "tokens": 4})
        return kept(made, items, rows, training, suite, **parents)

    return risk_roles(suite, given(made.training), given(None))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fabricated, str]]:
    """An evaluation of a tuned candidate that remembers what it saw sixteen times and favours one side of a pair."""
    made = fabricate(tmp_path_factory.mktemp("faulty"))
    own = {"dataset": made.dataset}
    arms = ("gender", "gender per token")
    swaps = [item(f"{arm}:{k}/{side}", arm, f"g{k}") for arm in arms for k in range(60) for side in "ab"]
    bbq = [item(f"b{k}", "ambiguous", choices=("x", "y", "z")) for k in range(60)]
    roles = {
        **_risk(made, "canaries", _canaries(24), lambda item: 20.0 if item.arm == "16" else 0.0, **own),
        **_risk(made, "swap/100", swaps, lambda item: 99.0 if item.id.endswith("a") else 0.0, **own),
        **_risk(made, "bbq/100/set", bbq, lambda item: 0.0),
    }
    digest = evaluated(made, probes=made.probes, roles=roles)
    yield made, digest
    made.store.engine.dispose()


@pytest.fixture(scope="module")
def risky(faulty: tuple[Fabricated, str]) -> EvidenceReport:
    """The report of its verdict. Not to be changed."""
    made, digest = faulty
    return report_data(made.store, digest, verdict_of(made, digest, RISK_GATES))


def test_exposure_and_bias_before_and_after(risky: EvidenceReport) -> None:
    found = risky.risks
    once, often = found.exposure.levels
    assert (once.repeats, often.repeats, found.exposure.most) == (1, 16, 7.0)
    assert once.after == once.before, "those planted once were not given a lift"
    assert once.after.low < 1.44 < once.after.high
    assert often.after.mean == 7.0
    assert often.before.high < often.after.low
    rows = {row.arm: row for row in found.bias}
    swap, bbq = rows["gender"], rows["ambiguous"]
    assert swap.change.low > 0.8
    assert "tuning made it worse" in swap.sentence
    assert bbq.before == bbq.after
    assert "there may be no change" in bbq.sentence
    assert set(found.unmeasured) == set(PROBES) - {"canaries", "swap", "bbq"}


def test_page_and_summary_say_what_was_found(risky: EvidenceReport) -> None:
    page = check_whole(render(risky))
    spoken = " ".join(value for name, value in page.attributes if name == "aria-label" and value)
    for said in ("planted 16× 7.0 bits", "chance is 1.4", "tuning made it worse", "Loss by training step, from"):
        assert said in spoken
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert all(row.sentence in text for row in (risky.risks.exposure, *risky.risks.bias))
    summary = risky.advice.summary
    for part in (
        "On 120 held-out requests, tuned answers 9", "exactly right; rag answers", "on the same requests is +",
        "seconds of this machine", "all but secrets (fail)", "people (fail)",
        f"{len(PROBES) - 3} of {len(PROBES)} risk probes were not measured",
    ):  # fmt: skip
        assert part in summary, part
    assert summary in report_markdown(risky)


def test_too_few_canaries_are_no_number(faulty: tuple[Fabricated, str]) -> None:
    made, _ = faulty
    few = _risk(made, "canaries", _canaries(3), lambda item: 0.0, dataset=made.dataset)
    data = report_data(made.store, evaluated(made, roles=few))
    assert data.risks.exposure.levels[0].after is None
    assert "planted once: too few secrets to measure" in data.risks.exposure.sentence
    assert "too few secrets to measure" in render(data)
