"""Scorers with settings of their own, and figures of all rows together: macro-F1, calibration error, Brier score."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.chat_server import ChatServer, chat_server, completion
from tests.evaluation.conftest import evaluated, outcome, verdict_of
from tests.fabricate import Fabricated, fabricate
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress, Silent
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.gates.verdict import replay
from tunesmith.evaluation.metrics import classification
from tunesmith.evaluation.metrics.answer_judge import judge_answers, last_word, read_judged
from tunesmith.evaluation.metrics.classification import Labelled, LabelLine, read_labels
from tunesmith.evaluation.metrics.declared import Answered, Declared, function_digests, make_scoring
from tunesmith.evaluation.metrics.scorers import SCORERS, bleu, chrf
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.html import render
from tunesmith.evaluation.scores import read_scores
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.stats.statistics import Level, interval
from tunesmith.records.evaluation import CalibrationBin

DECLARED: TypeAdapter[Any] = TypeAdapter(Declared)


def _score(scorer: Any, text: str, reference: str = "", root: Path = Path(), **more: Any) -> float:
    return make_scoring(DECLARED.validate_python(scorer), None, root)(Answered(text, reference, **more))


@pytest.mark.parametrize(
    ("scorer", "right", "wrong"),
    [
        ({"pattern": r"^\d{4}$"}, [("2026", "")], [("in 2026", "")]),
        ({"tolerance": 0.1}, [("0.3", "0.2")], []),
        ({"tolerance": 0.05, "relative": True}, [("104", "100")], [("106", "100")]),
        ({"tolerance": 1.0}, [], [("none", "3"), ("1e999", "3")]),
        ({"tolerance": 0.0}, [("The total is 1,234.50 euros.", "1234.5"), ("-1e3", "-1000")], []),
        ({"tolerance": 0.0}, [("It is \u22125", "-5"), ("10-20", "20"), ("x=-.5", "-0.5")], [("\u22125", "5")]),
        ({"label": "a"}, [('{"a": 1}', '{"a": "1"}'), ('{"a": 1}', '{"a": 1.0}')], [("no", '{"a": ""}')]),
        ({"label": "a"}, [('{"a": {"x": 1, "b": [2.0]}}', '{"a": {"b": [2], "x": 1.0}}')], [("no", '{"a": "x"}')]),
        ({"label": "a"}, [('{"a": ""}', '{"a": ""}')], [('{"a": null}', '{"a": "None"}')]),
        ({"label": "a"}, [], [('{"a": true}', '{"a": "True"}')]),
        ({"label": ""}, [(" Card \n", "card")], []),
        ({"label": "a.b"}, [('{"a": {"b": "x"}, "c": 1}', '{"a": {"b": "x"}}')], []),
    ],
)
def test_by_hand(scorer: Any, right: list[tuple[str, str]], wrong: list[tuple[str, str]]) -> None:
    for answer, reference in (*right, *wrong):
        found = _score({"name": "n", **scorer}, answer, reference)
        assert found == float((answer, reference) in right), (answer, reference)
    if not scorer.get("pattern") and scorer.get("label") != "":
        with pytest.raises(UsageError, match="reference"):
            _score({"name": "n", **scorer}, "1", "nothing here")


def test_text_scores_are_those_of_the_libraries_and_what_was_looked_up() -> None:
    import sacrebleu
    from rouge_score import rouge_scorer

    answer, reference = "the cats sat on a mat", "the cat sat on the mat today"
    expected = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert SCORERS[kind](answer, reference, None) == pytest.approx(expected[kind].fmeasure, abs=1e-12)
    assert chrf(answer, reference, None) == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score / 100)
    expected_bleu = sacrebleu.sentence_bleu(answer, [reference], use_effective_order=True).score / 100
    assert bleu(answer, reference, None) == pytest.approx(expected_bleu)
    assert bleu(reference, reference, None) == chrf(reference, reference, None) == 1.0
    asked: dict[str, Any] = {"request": (Message(role="user", content="Who made it?"),)}
    found = {**asked, "retrieved": ("It was made by Ada  Lovelace in 1843.",)}
    assert _score("retrieval_hit", "", "ada lovelace", **found) == 1.0
    assert _score("retrieval_hit", "", "Babbage", **found) == 0.0
    assert _score("retrieval_hit", "", "Ada Lovelace", **asked) == 0.0
    assert _score("groundedness", "Ada Lovelace made it", **found) == 1.0
    assert _score("groundedness", "Charles Babbage made it", **found) == 0.5
    assert _score("groundedness", "", **found) == 0.0


def test_the_user_s_own_function(tmp_path: Path) -> None:
    mine = {"name": "mine", "function": "mine.py:short"}
    for code, said in (
        ("def other(): 1", "no function short"),
        ("1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
        ("def short(*_): return 1 / 0", "raised ZeroDivisionError"),
    ):
        (tmp_path / "mine.py").write_text(code)
        with pytest.raises(UsageError, match=said):
            _score(mine, "x", root=tmp_path)
    digests = []
    for value in ("len(request)", "1.0 / len(answer)"):
        (tmp_path / "mine.py").write_text(f"def short(answer, reference, request):\n    return {value}\n")
        digests.append(function_digests([DECLARED.validate_python(mine)], tmp_path))
    assert digests[0] != digests[1]
    assert _score(mine, "abcd", root=tmp_path) == 0.25
    (tmp_path / "p").mkdir()
    for function, said in (("../mine.py:short", "outside the project"), ("gone.py:short", "no file")):
        with pytest.raises(UsageError, match=said):
            _score({"name": "mine", "function": function}, "x", root=tmp_path / "p")


labels = st.sampled_from(["a", "b", "c"])


@settings(max_examples=20)
@given(st.lists(st.tuples(labels | st.just("odd"), labels), min_size=1, max_size=40))
def test_macro_f1_is_scikit_learn_s(rows: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score

    said, held = [row[0] for row in rows], [row[1] for row in rows]
    found = classification.classes(labelled([(truth, answer, 1.0) for answer, truth in rows]), Level(0.95, 0))
    known = sorted(set(held))
    expected = f1_score(held, said, labels=known, average="macro", zero_division=0)
    measured = found.macro_f1
    assert measured.mean == pytest.approx(expected, abs=1e-9)
    assert 0.0 <= measured.low <= measured.mean <= measured.high <= 1.0
    each = dict(zip(known, f1_score(held, said, labels=known, average=None, zero_division=0), strict=True))
    assert {one.label: one.f1 for one in found.by_label} == pytest.approx(each, abs=1e-9)


def sure(confidences: list[float], right: list[float]) -> Labelled:
    """Labels with these confidences that are right or not."""
    return labelled([("a" if each else "b", "a", stated) for stated, each in zip(confidences, right, strict=True)])


def test_calibration_by_hand_and_by_scikit_learn() -> None:
    from sklearn.metrics import brier_score_loss

    random = np.random.RandomState(0)
    stated = random.rand(2000)
    honest = (random.rand(2000) < stated).astype(float)
    found = classification.calibration(sure(stated.tolist(), honest.tolist()))
    assert found.ece < 0.04
    assert found.brier == pytest.approx(brier_score_loss(honest, stated), abs=1e-9)
    boastful = classification.calibration(sure([0.95] * 10, [1.0] * 5 + [0.0] * 5))
    assert boastful.ece == pytest.approx(0.45)
    assert boastful.bins == (CalibrationBin(low=0.9, n=10, confidence=0.95, right=0.5),)
    assert classification.calibration(sure([1.0, 0.0], [1.0, 0.0])).ece == 0.0


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def _shorter(first: str, second: str) -> str:
    return "TIE" if first == second else "A" if len(first) < len(second) else "B"


def _verdict_by(prefer: Any) -> Any:
    """A judge that is given both answers: prefer(first, second) -> A, B or TIE."""

    def reply(body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        sides = [text.split(f"<answer_{side}>\n")[1].split(f"\n</answer_{side}>")[0] for side in "AB"]
        return 200, {}, completion(f"Because.\n{prefer(*sides)}")

    return reply


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    return fabricate(tmp_path_factory.mktemp("small"), n=24)


def _judged(
    made: Fabricated, server: ChatServer, work: Path, progress: Progress = SILENT
) -> tuple[dict[str, float], dict[str, Any], str]:
    judge = {"name": "better", "judge": {"url": server.url, "model": "j", "retries": 0}}
    task = TaskSettings.model_validate({"scorers": ["exact_match", judge]})
    test = load_dataset(made.store, made.dataset).examples("test")
    digest = judge_answers(made.store, task.judges[0], made.answers["rag"], made.dataset, test, work, progress)
    return *read_judged(made.store, digest, "better", made.answers["rag"], test), digest


def test_a_judge_that_looks_at_the_answers_agrees_with_itself(
    small: Fabricated, tmp_path: Path, server: ChatServer
) -> None:
    server.reply = _verdict_by(_shorter)
    scores, stated, digest = _judged(small, server, tmp_path)
    assert stated.agreement == 1.0
    assert set(scores.values()) <= {0.0, 0.5, 1.0}
    assert _judged(small, server, tmp_path)[2] == digest
    assert len(server.asked) == 2 * 24, "what was judged is not judged again"
    test = load_dataset(small.store, small.dataset).examples("test")
    for metric, answers, rows, said in (
        ("better", "tuned", test, "other answers were judged"),
        ("best", "rag", test, "not to 'judge:best'"),
        ("better", "rag", test[1:], "rows that were not asked"),
    ):
        with pytest.raises(Inconclusive, match=said):
            read_judged(small.store, digest, metric, small.answers[answers], rows)


def test_a_judge_that_prefers_a_place_says_nothing_or_is_cut_off_is_found_out(
    small: Fabricated, tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "say", said.append)
    for name, reply, undecided in (
        ("place", _verdict_by(lambda _a, _b: "A"), 0),
        ("nothing", lambda _: (200, {}, completion("I like both, A and B")), 48),
        ("cut", lambda _: (200, {}, completion("What decides:\nA", finish="length")), 48),
    ):
        server.reply = reply
        scores, stated, _ = _judged(small, server, tmp_path / name, progress)
        assert (stated.undecided, stated.agreement, set(scores.values())) == (undecided, 0.0, {0.5})
    assert len(said) == 2
    assert all("48 of 48 replies decide nothing" in line for line in said)


def test_declared_scorers_are_evidence_like_any_other(tmp_path: Path, server: ChatServer) -> None:
    made = fabricate(tmp_path / "store", n=40)
    (tmp_path / "mine.py").write_text("def short(answer, reference, request):\n    return float(len(answer) < 60)\n")
    server.reply = _verdict_by(lambda _a, _b: "A")
    scorers = [
        *("exact_match", "retrieval_hit", {"name": "brief", "function": "mine.py:short"}),
        *({"name": "braces", "pattern": r"^\{.*\}$"}, {"name": "intent", "label": "intent"}),
        {"name": "better", "judge": {"url": server.url, "model": "j"}},
    ]
    task = TaskSettings.model_validate({"scorers": scorers})
    test = load_dataset(made.store, made.dataset).examples("test")
    judged = {
        f"judged:better:{name}": judge_answers(made.store, task.judges[0], digest, made.dataset, test, tmp_path / name)
        for name, digest in made.answers.items()
    }
    more: dict[str, Any] = {"task": task, "answer_schema": None, "root": tmp_path}
    digest = evaluated(made, roles=judged, **more)
    record = made.store.record(digest, kind="evaluation")
    assert set(record.body["functions"]) == {"brief"}
    assert set(record.body["judges"]["better"]) == set(made.answers)
    assert record.body["candidates"]["tuned"]["classes"]["intent"]["labels"] > 1
    assert read_scores(made.store, record)["tuned", "brief"].values.max() <= 1.0
    verdict = verdict_of(made, digest, {"brief": {"metric": "brief", "at_least": 0.1}})
    shown = report_data(made.store, digest, verdict)
    assert "changed its verdict with the order" in " ".join(shown.advice.cautions)
    assert "Judges" in render(shown)
    (tmp_path / "mine.py").unlink()
    assert replay(made.store, verdict), "offline, without the function and the judge"
    (tmp_path / "mine.py").write_text("def short(*_): return 1.0\n")
    with pytest.raises(Inconclusive, match="has no judgements of"):
        evaluated(made, **more)


def test_a_verdict_stands_alone_on_the_last_line() -> None:
    slow = "verdict" + "-" * 100_000 + "x"  # with three repetitions side by side this would take hours
    replies = {
        "A": ("It is shorter.\n\n**A**", "My verdict: A", "The final verdict is **A**.", "$\\boxed{A}$"),
        "B": ("**Verdict:** __B__", "Winner: B"),
        "TIE": ("Final verdict: tie.", "Verdict - tie"),
        None: (
            *("This is a better answer overall.", "The verdict is not A.", "The winner is B or A", "Verdict: not A"),
            *("The answer is a better one", "A or B", "A\nThat is all.", "", slow, slow[7:]),
        ),
    }
    for verdict, said in replies.items():
        assert {reply: last_word(reply, ("A", "B", "TIE")) for reply in said} == dict.fromkeys(said, verdict)


@pytest.mark.parametrize("value", ["True", "float('nan')", "1.5", "'1'", "None", "10**400"])
def test_a_function_s_unusable_score_is_inconclusive(small: Fabricated, tmp_path: Path, value: str) -> None:
    (tmp_path / "mine.py").write_text(f"def f(answer, reference, request):\n    return {value}\n")
    task = TaskSettings.model_validate({"scorers": [{"name": "mine", "function": "mine.py:f"}]})
    with pytest.raises(Inconclusive, match="gave"):
        evaluated(small, task=task, answer_schema=None, root=tmp_path)


# Gates on figures of all rows together: macro-F1, calibration error, Brier score


def labelled(rows: list[tuple[str, str, float]]) -> Labelled:
    wanted, given_, sure = (tuple(row[place] for row in rows) for place in range(3))
    names = tuple(f"{n:03d}" for n in range(len(rows)))
    return Labelled(names, tuple(f"g{n // 2}" for n in range(len(rows))), wanted, given_, sure)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.9, 0.997])
def test_the_calibration_error_of_sure_answers_is_the_share_of_wrong_ones(confidence: float) -> None:
    """With its interval, whose ends are resampled figures: one between two of them would be too narrow."""
    found = labelled([("a", "a" if n % 5 else "b", 1.0) for n in range(40)])
    error = classification.calibration_error_interval(found, Level(confidence, 0))
    share = interval(1.0 - found.right, found.groups, (0.0, 1.0), Level(confidence, 0))
    assert (error.mean, error.low, error.high) == pytest.approx((share.mean, share.low, share.high), abs=1e-9)
    mixed = labelled([("ab"[n % 2], "aab"[n % 3], n / 40) for n in range(40)])
    macro = classification.macro_f1_interval(mixed, Level(0.9, 0))
    shown = classification.classes(mixed, Level(0.9, 0)).macro_f1
    assert macro.mean == pytest.approx(shown.mean, abs=1e-9)
    assert macro.low <= shown.low + 0.03, "the worst-case group is added"
    stated = classification.calibration(mixed)
    stated_error = classification.calibration_error_interval(mixed, Level(0.9, 0))
    brier = classification.brier_interval(mixed, Level(0.9, 0))
    assert (stated_error.mean, brier.mean) == pytest.approx((stated.ece, stated.brier), abs=1e-8)
    few = labelled([("a", "a", 1.0), ("b", "b", 1.0)] * 5)
    assert classification.macro_f1_interval(few, Level(0.95, 0)).low < 0.7, "five rows that are all right prove little"
    assert classification.calibration_error_interval(few, Level(0.95, 0)).high > 0.3


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fabricated, str]:
    made = fabricate(tmp_path_factory.mktemp("labels"), n=120)
    task = TaskSettings.model_validate({"scorers": ["exact_match", {"name": "intent", "label": "intent"}]})
    return made, evaluated(made, task=task, answer_schema=None)


def test_gates_on_figures_use_their_intervals(measured: tuple[Fabricated, str]) -> None:
    made, digest = measured
    stated = made.store.record(digest).body["candidates"]["tuned"]["classes"]["intent"]["macro_f1"]["mean"]
    for bound, expected in ((stated - 0.3, "pass"), (stated - 0.01, "inconclusive")):
        gate = outcome(made, digest, figure="macro_f1", metric="intent", at_least=bound)
        assert (gate["outcome"], gate["value"]) == (expected, stated)
    for figure, metric, said in (
        ("calibration_error", "intent", "state no confidence"),
        ("brier", "intent", "state no confidence"),
        ("macro_f1", "exact_match", "keeps no labels"),
    ):
        gate = outcome(made, digest, figure=figure, metric=metric, at_most=1.0)
        assert (gate["outcome"], said in gate["reason"]) == ("inconclusive", True)


def test_labels_that_differ_from_the_scores_are_refused(measured: tuple[Fabricated, str]) -> None:
    store, record = measured[0].store, measured[0].store.record(measured[1])
    columns = read_scores(store, record)
    lines = [json.loads(line) for line in store.read_blob(record.blobs[LabelLine.file]).splitlines()]
    assert read_labels(store, record, columns)["tuned", "intent"].ids == columns["tuned", "intent"].ids

    def with_lines(changed: list[Any]) -> Any:
        blob = store.put_bytes(b"\n".join(json.dumps(line).encode() for line in changed))
        return record.model_copy(update={"blobs": {**record.blobs, LabelLine.file: blob}})

    for changed in (
        [{**lines[0], "given": "no such"}, *lines[1:]],
        lines[1:],
        [lines[0], *lines],
        [{**lines[0], "confidence": True}, *lines[1:]],
        [{**lines[0], "group": "other"}, *lines[1:]],
        ["x", *lines],
    ):
        with pytest.raises(Inconclusive):
            read_labels(store, with_lines(changed), columns)
