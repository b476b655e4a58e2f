"""The page: what it says, that it is whole, and that hostile text stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import TASK
from tests.evaluation.gates.test_verdict import STANDARD
from tests.fabricate import SCHEMA, Fabricated, add, answer_lines, fabricate, put_answers
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.errors import Inconclusive
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import GATES
from tunesmith.evaluation.gates.verdict import judge
from tunesmith.evaluation.report import plots
from tunesmith.evaluation.report.advice import advise
from tunesmith.evaluation.report.data import release_trail, report_data
from tunesmith.evaluation.report.html import render, report_html
from tunesmith.evaluation.report.wording import detail_text, expected, percent, points, visible
from tunesmith.services.evaluations.evaluation import EvidenceReport
from tunesmith.store.records import Record

HOSTILE = (
    '</pre><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }} javascript:alert(3) '
    "\u202egpj.exe\u200b\x1b[31m"
)
VOID = {"meta", "br", "img", "circle", "line", "rect", "path"}


class Page(HTMLParser):
    """Tags and attributes of a page, and whether every tag that opens closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_whole(html: str) -> Page:
    """Well nested, and nothing in it runs or comes from elsewhere."""
    page = Page(html)
    assert not {"script", "img", "iframe", "link", "object", "embed", "form", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name != "src"
        if name == "href":
            assert value is not None
            assert value.startswith("#")
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    return page


def verdict_of(made: Fabricated, evaluation: str, name: str = "tuned", gates: Any = STANDARD) -> str:
    return judge(made.store, evaluation=evaluation, candidate=name, gates=GATES.validate_python(gates))


def test_the_page_of_a_released_version(made: Fabricated, evaluation: str) -> None:
    verdict = verdict_of(made, evaluation)
    parents = {"candidate": made.candidates["tuned"], "evaluation": evaluation, "verdict": verdict}
    body = {"name": "home", "number": 3, "tenant": "", "region": "", "override": None, "signer": "olga"}
    version = made.store.put_record(Record(kind="version", parents=parents, body=body))
    said = {"approver": "amir", "decision": "approve", "reason": "sound"}
    made.store.put_record(Record(kind="approval", parents={"version": version}, body=said))
    trail = [{"at": "2026-02-03T10:11:12.5Z", "actor": "amir", "action": "version.approve", "subject": version,
              "detail": {"reason": "sound", "empty": None}}]  # fmt: skip
    html = report_html(made.store, evaluation, verdict, version, trail)
    page = check_whole(html)
    text = re.sub(r"\s+", " ", " ".join(page.text))
    data = report_data(made.store, evaluation, verdict, version, trail)
    assert EvidenceReport.model_validate(data).document() == json.loads(json.dumps(data)), "the typed report is whole"
    tuned = data["candidates"][0]
    for part in (
        "Release tuned.", "home@v3", percent(tuned["metrics"]["exact_match"]["mean"]), "passed all 3 gates",
        points(data["lift"]["metrics"]["exact_match"]["difference"]["mean"]), "6 retrieved examples in the prompt",
        "9 validation rows are too few",
        "estimate 2 min 56 s, 9% off", "exact duplicate", "Licence Apache-2.0", "PHONE_NUMBER", "approve by amir",
        "2026-02-03 10:11:12 UTC", "reason: sound", "general questions",
    ):  # fmt: skip
        assert part in text, part
    assert [node["kind"] for node in data["lineage"]] == [
        "base", "dataset", "training", "candidate", "answers", "evaluation", "verdict", "version", "approval",
    ]  # fmt: skip
    assert all(parent < place for place, node in enumerate(data["lineage"]) for parent in node["parents"])
    assert report_html(made.store, evaluation, verdict, version, trail) == html, "the same records, the same page"
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize("name", ["zero-shot", "rag", "tuned"])
@pytest.mark.parametrize("gates", [STANDARD, {}])
def test_pages_of_every_verdict_are_whole(made: Fabricated, evaluation: str, name: str, gates: Any) -> None:
    check_whole(report_html(made.store, evaluation, verdict_of(made, evaluation, name, gates)))


@pytest.mark.parametrize(
    ("outcome", "rehearsed", "share"),
    [("fail", None, "0.02"), ("inconclusive", 0.05, "0.1"), ("fail", 0.6, "1"), ("fail", 1.0, None)],
)
def test_what_is_forgotten_names_rehearsal(
    made: Fabricated, evaluation: str, outcome: str, rehearsed: float | None, share: str | None
) -> None:
    data = report_data(made.store, evaluation, verdict_of(made, evaluation))
    stated = {} if rehearsed is None else {"rehearse": rehearsed}
    data["training"] = {**data["training"], "settings": {**data["training"]["settings"], **stated}}
    (gate,) = (gate for gate in data["verdict"]["gates"] if "suite" in gate["settings"])
    assert "rehearse" not in " ".join(advise(data)["reasons"]), "the gate passed"
    gate["outcome"] = outcome
    reasons = " ".join(advise(data)["reasons"])
    assert f"`train: {{rehearse: {share}}}`" in reasons if share else "rehearse" not in reasons


def test_the_contents_lead_to_sections_in_order(made: Fabricated, evaluation: str) -> None:
    html = report_html(made.store, evaluation, verdict_of(made, evaluation))
    head, main = html.split("<main>")
    linked = re.findall(r'href="#([a-z-]+)"', head)
    assert linked == re.findall(r'<section id="([a-z-]+)"', main)
    assert linked[:3] == ["why", "gates", "candidates"], "the decision stands above them"


def test_headlines(made: Fabricated, evaluation: str) -> None:
    def advice(verdict: str | None) -> dict[str, Any]:
        return dict(report_data(made.store, evaluation, verdict)["advice"])

    assert advice(verdict_of(made, evaluation))["release"] == "tuned"
    second = advice(verdict_of(made, evaluation, "rag", {"any": {"metric": "exact_match", "at_least": 0.1}}))
    assert (second["headline"], second["release"]) == ("rag may be released, but tuned scored higher.", "rag")
    failed = advice(verdict_of(made, evaluation, "zero-shot"))
    assert (failed["headline"], failed["release"]) == ("Do not release zero-shot.", None)
    assert any("tunesmith gate tuned" in reason for reason in failed["reasons"])
    open_ended = advice(verdict_of(made, evaluation, gates={}))
    assert (open_ended["headline"], open_ended["release"]) == ("There is not enough evidence to release tuned.", None)
    assert advice(None)["headline"] == "tuned was measured, but no gates have judged it."


def test_an_equal_candidate_did_not_score_higher(made: Fabricated) -> None:
    lines = answer_lines(made.test, lambda row: row.answer)
    answers = {name: put_answers(made.store, made.candidates[name], made.dataset, lines) for name in ("rag", "tuned")}
    equal = evaluate(made.store, dataset=made.dataset, answers=answers, probes={}, task=TASK, answer_schema=SCHEMA)
    for name in answers:
        verdict = verdict_of(made, equal, name, {"any": {"metric": "exact_match", "at_least": 0.1}})
        advice = report_data(made.store, equal, verdict)["advice"]
        assert advice["headline"] == f"Release {name}."
        assert "2 requests in the data have different answers: a candidate cannot give both." in advice["cautions"]
        assert "no candidate can score" not in " ".join(advice["cautions"]), "they are no test rows, and this one did"


def test_one_candidate_alone_and_no_probes(made: Fabricated) -> None:
    alone = evaluate(made.store, dataset=made.dataset, answers={"zero-shot": made.answers["zero-shot"]}, probes={},
                     task=TASK, answer_schema=SCHEMA)  # fmt: skip
    data = report_data(made.store, alone)
    assert (data["rival"], data["lift"], data["examples"], data["forgetting"], data["training"]) == (None,) * 5
    assert "Besides zero-shot, 0 untuned candidates were measured" in " ".join(data["advice"]["reasons"])
    assert "0 untuned candidates were measured, so the report" not in " ".join(data["advice"]["reasons"])
    check_whole(render(data))


def test_a_handful_of_rows(tmp_path: Path) -> None:
    made = fabricate(tmp_path, n=3)
    few = evaluate(made.store, dataset=made.dataset, answers=made.answers, probes=made.probes, task=TASK,
                   answer_schema=SCHEMA)  # fmt: skip
    html = report_html(made.store, few, verdict_of(made, few))
    check_whole(html)
    assert "There is not enough evidence to release" in html


def test_wins_and_losses_come_one_from_each_group_first(made: Fabricated, evaluation: str) -> None:
    examples = report_data(made.store, evaluation, verdict_of(made, evaluation))["examples"]
    for side, better in (("wins", "focus"), ("losses", "rival")):
        shown = examples[side]["shown"]
        assert 0 < len(shown) <= 6
        assert len({row["group"] for row in shown}) == min(len(shown), examples[side]["n"])
        for row in shown:
            assert row[better]["score"] == 1.0
            assert {row["focus"]["score"], row["rival"]["score"]} == {0.0, 1.0}


def test_hostile_text_stays_text(made: Fabricated) -> None:
    add(made, Candidate(name=HOSTILE, prompt="x", base=made.base, max_tokens=9), lambda row: HOSTILE, 1, 1)
    lines = answer_lines(made.test, lambda row: row.answer)
    for line in lines[::2]:
        line["text"] = HOSTILE
    made.answers["tuned"] = put_answers(made.store, made.candidates["tuned"], made.dataset, lines)
    hostile = evaluate(made.store, dataset=made.dataset, answers=made.answers, probes=made.probes, task=TASK,
                       answer_schema=SCHEMA)  # fmt: skip
    gates = {HOSTILE: {"metric": "exact_match", "over": HOSTILE, "at_least": 0.05}}
    trail = [{"at": HOSTILE, "actor": HOSTILE, "action": HOSTILE, "subject": HOSTILE, "detail": {HOSTILE: [HOSTILE]}}]
    verdict = judge(made.store, evaluation=hostile, candidate="tuned", gates=GATES.validate_python(gates))
    html = report_html(made.store, hostile, verdict, None, trail)
    page = check_whole(html)
    text = "".join(page.text)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7*7 }}" in text
    assert "⟨U+202E⟩" in text
    assert not set("\u202e\u200b\x1b") & set(html)


def test_untrustworthy_scores_make_no_page(made: Fabricated, evaluation: str) -> None:
    record = made.store.record(evaluation)
    empty = record.model_copy(update={"blobs": {"scores.jsonl": made.store.put_bytes(b"")}})
    with pytest.raises(Inconclusive):
        report_html(made.store, made.store.put_record(empty))


def test_the_trail_is_the_model_s_own(made: Fabricated) -> None:
    digest = "sha256:" + "7" * 64
    for subject in ("home", "home@champion", "home2", "olga", digest, "home2@champion"):
        with made.store.change("olga", "x.y", subject, {"n": 1}):
            pass
    assert [entry["subject"] for entry in release_trail(made.store, "home", digest)] == [
        "home",
        "home@champion",
        digest,
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (1.0, "100%"), (0.5, "50.0%"), (0.9999, "99.9%"), (0.0001, "0.1%"), (0.9951, "99.5%")],
)
def test_percent_never_claims_all_or_nothing(share: float, text: str) -> None:
    assert percent(share) == text


def test_words() -> None:
    assert points(0.0512) == "+5.1"
    assert points(-0.0512) == "−5.1"
    assert points(-0.00001) == "0.0"
    assert visible("a\tb\nc\u2066d") == "a\tb\nc⟨U+2066⟩d"
    assert visible("x" * 1000).endswith("… and 100 more characters")
    assert detail_text({"a": 1, "b": None, "c": {"d": ["e", "sha256:" + "0" * 64]}}) == "a: 1, c: d: e 000000000000"
    assert expected(90.0, 100.0, lambda seconds: f"{seconds:.0f} s") == "estimate 100 s, 10% off"
    assert expected(1.0, 0.0, str) == "no estimate"


@pytest.mark.parametrize(
    "losses",
    [[2.0, 1.0, 0.01], [0.5, 0.4], [1.0, 1.0], [7000.0, 6999.0], [1e-9, 1.0], [0.2] * 5000, [3.0, 2.0, float("nan")]],
)
def test_loss_charts_of_odd_curves(losses: list[float]) -> None:
    curve = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    drawn = plots.loss_chart(curve, curve[:1])
    Page(str(drawn))
    heights = [float(y) for _, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", str(drawn))]
    assert heights
    assert all(-0.1 <= height <= 220.1 for height in heights)
    assert len(str(drawn)) < 40_000


def test_a_loss_chart_of_nothing_is_nothing() -> None:
    assert plots.loss_chart([], []) == ""
    assert plots.loss_chart([{"step": 1, "loss": 1.0}], []) == ""


def test_scales_stay_within_the_picture() -> None:
    scale = plots.Scale(-0.1, 0.3)
    assert [scale.at(value) for value in (-1.0, -0.1, 0.1, 0.3, 5.0)] == [
        "0.00%",
        "0.00%",
        "50.00%",
        "100.00%",
        "100.00%",
    ]
