"""The page: what it says, that it is whole, and that hostile text stays text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from tests.evaluation.conftest import STANDARD, evaluated, verdict_of
from tests.fabricate import Fabricated, add, answer_lines, fabricate, put_answers, version_body
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.text.wording import detail_text, expected, percent, points, visible
from tunesmith.evaluation.report import plots
from tunesmith.evaluation.report.advice import advise
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.evidence import EvidenceReport, TrailEntry
from tunesmith.evaluation.report.html import render
from tunesmith.records.training import TrainedStep
from tunesmith.records.version import ApprovalBody
from tunesmith.services.evaluations import release_trail

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
        assert name != "href" or str(value).startswith("#")
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    return page


def test_the_page_of_a_released_version(made: Fabricated, evaluation: str) -> None:
    verdict = verdict_of(made, evaluation)
    parents = {"candidate": made.candidates["tuned"], "evaluation": evaluation, "verdict": verdict}
    body = version_body("home", 3)
    version = made.store.put_record(body.record(parents))
    said = {"role": "approver", "override": None, "audit": body.audit, "at": "x", "until": "x", "nonce": "x"}
    approval = ApprovalBody(approver="amir", decision="approve", reason="sound", **said)
    made.store.put_record(approval.record({"version": version}))
    entry = {"at": "2026-02-03T10:11:12.5Z", "actor": "amir", "action": "version.approve", "subject": version}
    trail = [TrailEntry(**entry, does="approved a version", detail={"reason": "sound", "empty": None})]
    data = report_data(made.store, evaluation, verdict, version, trail)
    html = render(data)
    text = re.sub(r"\s+", " ", " ".join(check_whole(html).text))
    assert EvidenceReport.model_validate_json(json.dumps(data.document(), allow_nan=False)) == data
    tuned = data.candidates[0]
    for part in (
        "home@v3", percent(tuned.metrics["exact_match"].mean), "passed all 3 gates",
        points(data.lift.metrics["exact_match"].difference.mean), "6 retrieved examples in the prompt",
        "9 validation rows are too few",
        "estimate 2 min 56 s, 9% off", "exact duplicate", "Licence Apache-2.0", "PHONE_NUMBER", "approve by amir",
        "2026-02-03 10:11:12 UTC", "reason: sound", "general questions",
    ):  # fmt: skip
        assert part in text, part
    assert "constrained to the grammar" not in text
    assert [node.kind for node in data.lineage] == [
        "base", "dataset", "training", "candidate", "answers", "evaluation", "verdict", "version", "approval",
    ]  # fmt: skip
    assert all(parent < place for place, node in enumerate(data.lineage) for parent in node.parents)
    assert render(report_data(made.store, evaluation, verdict, version, trail)) == html, "the same page again"
    contents, _, sections = html.partition("</nav>")
    linked = re.findall(r'href="#([a-z-]+)"', contents)
    assert linked == re.findall(r'<section id="([a-z-]+)"', sections), "the contents lead to sections in order"
    for side, better, worse in (("wins", "focus", "rival"), ("losses", "rival", "focus")):
        shown = getattr(data.examples, side).shown
        assert 0 < len(shown) <= 6
        assert len({row.group for row in shown}) == len(shown), "one of each group"
        assert all((getattr(row, better).score, getattr(row, worse).score) == (1.0, 0.0) for row in shown)


def test_headlines_of_every_verdict(made: Fabricated, evaluation: str) -> None:
    any_right = {"any": {"metric": "exact_match", "at_least": 0.1}}
    for name, gates, headline, release in (
        ("tuned", STANDARD, "Release tuned.", "tuned"),
        ("rag", any_right, "rag may be released, but tuned scored higher.", "rag"),
        ("zero-shot", STANDARD, "Do not release zero-shot.", None),
        ("tuned", {}, "There is not enough evidence to release tuned.", None),
        ("tuned", None, "tuned was measured, but no gates have judged it.", None),
    ):
        data = report_data(made.store, evaluation, None if gates is None else verdict_of(made, evaluation, gates, name))
        assert (data.advice.headline, data.advice.release) == (headline, release)
        check_whole(render(data))
        if name == "zero-shot":
            assert any("tunesmith gate tuned" in reason for reason in data.advice.reasons)


def test_what_is_forgotten_names_rehearsal(made: Fabricated, evaluation: str) -> None:
    data = report_data(made.store, evaluation, verdict_of(made, evaluation))
    assert "rehearse" not in " ".join(advise(data).reasons), "the gate passed"
    for found, stated, share in (
        ("fail", {}, "0.02"),
        ("inconclusive", {"rehearse": 0.05}, "0.1"),
        ("fail", {"rehearse": 0.6}, "1"),
        ("fail", {"rehearse": 1.0}, None),
    ):
        gates = tuple(gate.model_copy(update={"outcome": found}) for gate in data.verdict.gates)
        verdict = data.verdict.model_copy(update={"gates": gates})
        settings = data.training.settings.model_copy(update=stated)
        training = data.training.model_copy(update={"settings": settings})
        reasons = " ".join(advise(data.model_copy(update={"verdict": verdict, "training": training})).reasons)
        assert f"`train: {{rehearse: {share}}}`" in reasons if share else "rehearse" not in reasons


def test_one_candidate_alone_and_a_handful_of_rows(made: Fabricated, tmp_path: Path) -> None:
    alone = evaluated(made, answers={"zero-shot": made.answers["zero-shot"]})
    data = report_data(made.store, alone)
    assert (data.rival, data.lift, data.examples, data.forgetting, data.training) == (None,) * 5
    assert "Besides zero-shot, 0 untuned candidates were measured" in data.advice.summary
    check_whole(render(data))
    small = fabricate(tmp_path / "small", n=3)
    few = evaluated(small, probes=small.probes)
    html = render(report_data(small.store, few, verdict_of(small, few)))
    check_whole(html)
    assert "There is not enough evidence to release" in html


def test_hostile_text_stays_text(made: Fabricated) -> None:
    add(made, Candidate(name=HOSTILE, prompt="x", base=made.base, max_tokens=9), lambda row: HOSTILE, 1, 1)
    lines = answer_lines(made.test, lambda row: row.answer)
    for line in lines[::2]:
        line["text"] = HOSTILE
    made.answers["tuned"] = put_answers(made.store, made.candidates["tuned"], made.dataset, lines)
    hostile = evaluated(made, probes=made.probes)
    verdict = verdict_of(made, hostile, {HOSTILE: {"metric": "exact_match", "over": HOSTILE, "at_least": 0.05}})
    entry = dict.fromkeys(("at", "actor", "action", "does", "subject"), HOSTILE)
    trail = [TrailEntry(**entry, detail={HOSTILE: [HOSTILE]})]
    html = render(report_data(made.store, hostile, verdict, None, trail))
    text = "".join(check_whole(html).text)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7*7 }}" in text
    assert "⟨U+202E⟩" in text
    assert not set("\u202e\u200b\x1b") & set(html)


def test_the_trail_is_the_model_s_own(made: Fabricated) -> None:
    digest = "sha256:" + "7" * 64
    for subject in ("home", "home@champion", "home2", "olga", digest, "home2@champion"):
        with made.store.change("olga", "x.y", subject, {"n": 1}):
            pass
    found = [entry.subject for entry in release_trail(made.store, "home", digest)]
    assert found == ["home", "home@champion", digest]


def test_words() -> None:
    shares = (0.0, 1.0, 0.5, 0.9999, 0.0001, 0.9951)
    assert [percent(share) for share in shares] == ["0%", "100%", "50.0%", "99.9%", "0.1%", "99.5%"]
    assert [points(each) for each in (0.0512, -0.0512, -0.00001)] == ["+5.1", "−5.1", "0.0"]
    assert visible("a\tb\nc\u2066d") == "a\tb\nc⟨U+2066⟩d"
    assert visible("x" * 1000).endswith("… and 100 more characters")
    assert detail_text({"a": 1, "b": None, "c": {"d": ["e", "sha256:" + "0" * 64]}}) == "a: 1, c: d: e 000000000000"
    assert expected(1.0, 0.0, str) == "no estimate"


def test_loss_charts_of_odd_curves() -> None:
    for losses in ([2.0, 1.0, 0.01], [1.0, 1.0], [7000.0, 6999.0], [1e-9, 1.0], [0.2] * 5000, [3, 2, float("nan")]):
        curve = [TrainedStep.model_construct(step=step, loss=loss) for step, loss in enumerate(losses, start=1)]
        drawn = plots.loss_chart(curve, curve[:1])
        assert drawn is not None
        heights = [float(y) for path in drawn.paths.values() for y in re.findall(r" (-?[\d.]+)(?: L|$)", path)]
        assert heights
        assert all(-0.1 <= height <= 220.1 for height in heights)
        assert sum(map(len, drawn.paths.values())) < 40_000
    assert plots.loss_chart(curve[:1], []) is None
