"""Money, ladder, groups, classes and judges in the report: the arithmetic, the page, the Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chat_server import chat_server, completion
from tests.evaluation.conftest import TASK
from tests.evaluation.report.test_report import check_whole, verdict_of
from tests.fabricate import SCHEMA, Fabricated, add, answer_lines, fabricate, flawed, put_answers
from tunesmith.candidates.candidate import Candidate, RemoteModel
from tunesmith.candidates.settings import TokenPrice
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.evaluate import Costs, evaluate
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.metrics.judging import judge_answers
from tunesmith.evaluation.prices import break_even
from tunesmith.evaluation.report.advice import advise
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.html import render
from tunesmith.evaluation.report.markdown import report_markdown
from tunesmith.evaluation.report.wording import money
from tunesmith.evaluation.settings import PriceSettings, TaskSettings


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fabricated, str]]:
    """A store with a floor and an endpoint beside the usual four, with prices, labels and a judge."""
    folder = tmp_path_factory.mktemp("rich")
    made = fabricate(folder / "store")
    common: dict[str, Any] = {"base": made.base, "max_tokens": 128}
    floor = Candidate(name="nearest", prompt="", method="nearest", dataset=made.dataset, **common)
    add(made, floor, flawed(0.2, 1.0, 21), 0, 0.02)
    rival = RemoteModel(url="https://rival.example/v1", model="big")
    add(made, Candidate(name="rival", prompt="Answer.", endpoint=rival, **common), flawed(0.8, 1.0, 22), 210, 30.0)
    with chat_server() as server:
        server.reply = lambda _: (200, {}, completion("A"))
        task = TaskSettings.model_validate(
            {
                "scorers": [
                    "json_valid",
                    "exact_match",
                    {"name": "intent", "label": "intent"},
                    {"name": "better", "judge": {"url": server.url, "model": "j"}},
                ]
            }
        )
        test = load_dataset(made.store, made.dataset).examples("test")
        judged = {
            (name, "better"): judge_answers(made.store, task.judges[0], digest, made.dataset, test, folder / name)
            for name, digest in made.answers.items()
        }
    costs = Costs(PriceSettings(machine_hour=3.6, currency="EUR"), {"rival": TokenPrice(prompt=1.0, answer=10.0)})
    arguments: dict[str, Any] = {"answers": made.answers, "probes": made.probes, "judged": judged, "costs": costs}
    digest = evaluate(made.store, dataset=made.dataset, task=task, answer_schema=SCHEMA, **arguments)
    yield made, digest
    made.store.engine.dispose()


def test_money_follows_from_what_was_measured(rich: tuple[Fabricated, str]) -> None:
    made, digest = rich
    body = made.store.record(digest).body
    for stated in body["candidates"].values():
        price = stated["price"]
        if stated is body["candidates"]["rival"]:
            expected = (price["prompt_tokens_per_1000"] + 10 * price["completion_tokens_per_1000"]) / 1e6
        else:
            expected = price["seconds_per_1000"] * 0.001
        assert price["money_per_1000"] == pytest.approx(expected, abs=1e-9)
    assert body["candidates"]["tuned"]["training"] == {"seconds": 159.8, "money": 0.1598}
    found = report_data(made.store, digest, verdict_of(made, digest))["break_even"]
    own, rival = (body["candidates"][name]["price"]["money_per_1000"] for name in ("tuned", "rival"))
    assert found["saved_per_1000"] == pytest.approx(rival - own)


def test_costs_are_told_where_they_are_known_and_an_endpoint_s_time_is_not_this_machine_s(
    rich: tuple[Fabricated, str],
) -> None:
    made, digest = rich
    data = report_data(made.store, digest, verdict_of(made, digest, gates=_gates()))
    assert data["rival"] == "rival"
    assert "seconds of this machine" not in " ".join(data["advice"]["reasons"])

    def without_money(*names: str) -> dict[str, Any]:
        rows = [
            {**row, "price": {key: each for key, each in row["price"].items() if key != "money_per_1000"}}
            if row["name"] in names
            else row
            for row in data["candidates"]
        ]
        return {**data, "candidates": rows, "break_even": None}

    own = next(row["price"]["money_per_1000"] for row in data["candidates"] if row["name"] == "tuned")
    assert f"1,000 requests cost {money(own)} EUR with tuned." in advise(without_money("rival"))["summary"]
    here = [row["name"] for row in data["candidates"] if row["name"] != "rival"]
    only_the_rival_has = advise(without_money(*here))["summary"]
    assert " seconds of this machine. " in only_the_rival_has
    page = render({**without_money(*here, "rival"), "currency": None})
    chart = re.search(r'aria-label="(exact_match against seconds of this machine[^"]*)"', page)
    assert chart is not None
    assert all(name in chart[1] for name in here)
    assert "rival" not in chart[1]


@pytest.mark.parametrize(
    ("own", "rival", "spent", "expected"),
    [(0.1, 0.3, 10.0, 50_000), (0.3, 0.1, 10.0, None), (0.1, 0.1, 10.0, None), (0.1, 0.3, 0.0, 0)],
)
def test_when_tuning_pays(own: float, rival: float, spent: float, expected: int | None) -> None:
    mine = {"tuned": True, "price": {"money_per_1000": own}, "training": {"money": spent}}
    found = break_even(mine, {"price": {"money_per_1000": rival}})
    assert found is not None
    assert found["requests"] == expected
    assert break_even(mine, {"price": {}}) is None


def test_only_a_trained_candidate_has_a_training_to_repay(rich: tuple[Fabricated, str]) -> None:
    made, digest = rich
    for name, trained in (("tuned", True), ("rag", False)):
        data = report_data(made.store, digest, verdict_of(made, digest, name, gates=_gates()))
        assert data["break_even"] is not None
        page = render(data)
        check_whole(page)
        assert "Saved per 1,000 requests" in page
        assert ("Training of" in page, "Training repaid after" in page) == (trained, trained)


def test_approach_ladder_climbs_only_where_intervals_say_so(rich: tuple[Fabricated, str]) -> None:
    made, digest = rich
    found = report_data(made.store, digest)["ladder"]
    names = [(rung["approach"], rung["candidate"]) for rung in found["rungs"]]
    assert names == [
        ("baseline", "nearest"),
        ("prompting", "zero-shot"),
        ("examples in the prompt", "few-shot"),
        ("retrieval", "rag"),
        ("tuning", "tuned"),
        ("endpoint", "rival"),
    ]
    steps = {step["candidate"]: step for step in found["steps"]}
    assert steps["zero-shot"]["over"] == "nearest"
    assert steps["zero-shot"]["difference"]["high"] < 0
    assert steps["few-shot"]["over"] == "nearest", "prompting was not shown to beat the floor"
    assert steps["rival"]["over"] == "tuned"
    assert found["chosen"]["candidate"] == "tuned"


def test_groups_add_up(rich: tuple[Fabricated, str]) -> None:
    made, digest = rich
    data = report_data(made.store, digest)
    found = data["by_group"]
    assert found["better"] + found["worse"] + found["alike"] == found["groups"] == data["groups"]
    assert all(row["difference"] == pytest.approx(row["own"] - row["other"]) for row in found["shown"])


def test_the_page_is_whole_and_says_it_all(rich: tuple[Fabricated, str]) -> None:
    made, digest = rich
    data = report_data(made.store, digest, verdict_of(made, digest, gates=_gates()))
    html = render(data)
    check_whole(html)
    for said in ("Price against quality", "Which approach helps", "Lift by group", "Macro-F1", "Judges", "EUR"):
        assert said in html
    assert html == render(report_data(made.store, digest, verdict_of(made, digest, gates=_gates())))
    said = " ".join(data["advice"]["reasons"] + data["advice"]["cautions"])
    assert "The best approach is tuning (tuned, 93.3%): +70.0 points" in said
    assert "Not shown to add anything to a simpler approach: prompting (zero-shot)" in said
    assert "it can be measured, but not released" in said
    assert "changed its verdict with the order" in said, "this judge always says A"


def test_markdown_is_one_table_row_a_candidate(rich: tuple[Fabricated, str]) -> None:
    made, digest = rich
    text = report_markdown(report_data(made.store, digest, verdict_of(made, digest, gates=_gates())))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum("**tuned**" in row for row in rows) == 1
    assert len(rows) == 1 + 6 + 1 + len(_gates())
    widths = {row.count(" | ") for row in rows[:7]}
    assert len(widths) == 1


def test_hostile_names_do_not_break_the_markdown(rich: tuple[Fabricated, str]) -> None:
    made, digest = rich
    data = dict(report_data(made.store, digest))
    evil = "x | <img src=x> [a](javascript:1)\n# head `code` @all"
    data["candidates"] = [{**row, "name": evil, "how": evil} for row in data["candidates"]]
    text = report_markdown(data)
    assert "<img" not in text.replace("\\<", "")
    assert "\n# head" not in text
    assert re.search(r"(?<!\\)\]\(", text) is None
    assert "\n" + "| x \\| " in text.replace("| **", "| ")


def _gates() -> Any:
    return GATES.validate_python({"lift": {"metric": "exact_match", "over": "best-untuned", "at_least": 0.0}})


def test_an_endpoint_is_neither_released_nor_recommended(made: Fabricated) -> None:
    remote = RemoteModel(url="https://gpt.example/v1", model="big")
    endpoint = Candidate(name="gpt", prompt="Answer.", base=made.base, max_tokens=9, endpoint=remote)
    add(made, endpoint, lambda row: row.answer, 210, 30.0)
    weaker = answer_lines(made.test, flawed(0.7, 1.0, 14))
    made.answers["tuned"] = put_answers(made.store, made.candidates["tuned"], made.dataset, weaker)
    arguments: dict[str, Any] = {"answers": made.answers, "probes": made.probes, "task": TASK, "answer_schema": SCHEMA}
    digest = evaluate(made.store, dataset=made.dataset, **arguments)
    lift = {"metric": "exact_match", "over": "rag", "at_least": 0.0}

    def advice(name: str, **gates: Any) -> dict[str, Any]:
        return dict(report_data(made.store, digest, verdict_of(made, digest, name, {"lift": lift, **gates}))["advice"])

    passed = advice("gpt")
    assert passed["headline"] == "gpt passed its gates, but an endpoint cannot be released."
    assert passed["release"] is None
    assert passed["summary"].startswith("gpt answers 100 of 100 requests exactly right. ")
    unknown = advice("gpt", forgetting={"suite": "general", "drop_at_most": 0.03})
    assert unknown["headline"] == "gpt was judged, but an endpoint cannot be released."
    for found in (passed, unknown):
        assert "tuned scored highest of 4 candidates that answer here" in found["reasons"][-1]
    tuned = advice("tuned")
    assert (tuned["headline"], tuned["release"]) == ("tuned may be released, but gpt scored higher.", "tuned")
    assert "tunesmith gate" not in " ".join(tuned["reasons"])


def test_without_prices_nothing_is_said_of_money(made: Fabricated, evaluation: str) -> None:
    data = report_data(made.store, evaluation)
    assert data["currency"] is None
    assert data["break_even"] is None
    assert "machine_hour" not in str(made.store.record(evaluation).body)
    assert "money" not in " ".join(data["advice"]["reasons"])
